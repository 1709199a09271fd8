"""Sharpness-aware minimization as a model around a model: SAM and ASAM of all weights, or of normalization only."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import keras
from keras import ops

from keras_proxynorm.training import passes
from keras_proxynorm.training.perturbation import ADAPTIVE
from keras_proxynorm.training.perturbation import NORMS
from keras_proxynorm.training.perturbation import perturbations

__all__ = ["SharpnessAwareMinimization"]

_STEPS = ("train_step", "test_step", "compute_loss", "compute_metrics")


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class SharpnessAwareMinimization(keras.Model):
    """Trains a model where the loss is flat: with its gradient at weights that are moved to where the loss is higher.

    Each step takes the gradient ``g`` at the weights ``w``, from it a perturbation ``e`` with which the loss grows, and
    then the gradient at ``w + e``, on the same batch and with the same dropout. The optimizer applies the latter at
    ``w``, where its weight decay and its momentum are, too. A step costs two. With ``norm="l2"``,
    ``e = rho * T^2 g / |T g|``, where the norm is one over all variables that are perturbed; with ``norm="linf"``,
    ``e = rho * T sign(g)``. ``T`` is what `adaptive` chooses.

    By default only scales and offsets of normalization are perturbed (SAM-ON); the optimizer still updates everything.
    They need a larger `rho` than all weights do; the authors of SAM-ON take 0.5, and 10 with ``"elementwise"`` and
    `normalize_bias`. The radius of 0.05 is that of SAM, `eta` that of ASAM; the scope, and that proxies are not
    perturbed unless asked for, are choices of this project.

    Compile and fit it as any model: data, weights of samples, callbacks, mixed precision, XLA, `steps_per_execution`
    and saving work as ever. Loss and metrics that training reports are those of the first pass, so at ``w``. The model
    shares its weights with ``.model``, which is what to export. A step is that of `keras.Model`: models with a
    `train_step` or a `compute_loss` of their own are refused.

    - With `tf.distribute`, each replica perturbs by the gradient of its own share of the batch, as the authors of SAM
      do ("m-sharpness"). With JAX's `keras.distribution`, the gradient is that of the whole batch.
    - If a gradient is not finite, nothing is perturbed, and a `keras.optimizers.LossScaleOptimizer` skips the step.
    - Layers draw the same random numbers in both passes if they have a `keras.random.SeedGenerator`, as those of Keras
      do; what draws without, or with functions of the backend, draws anew.

    Args:
        model: The `keras.Model` to train.
        rho: The radius of the perturbation. With 0, steps are exactly those of the optimizer. It can be set at any
            time, as by a callback, for some epochs with the optimizer alone.
        adaptive: None for SAM, ``T = 1``. For ASAM, ``"elementwise"``, ``T = |w| + eta``, or ``"layerwise"``,
            ``T = (1 + eta) * |w|`` with the Euclidean norm of each variable. Biases and offsets, whose names end with
            ``bias`` or ``beta``, keep ``T = 1``.
        norm: ``"l2"`` or ``"linf"``.
        eta: With ``"elementwise"``, what keeps the scales of small weights away from 0: with 0, offsets and scales that
            start at 0 are not perturbed. With ``"layerwise"`` a factor, so that a variable of zeros never is.
        scope: Which of the trainable variables are perturbed: ``"norm"`` for those named exactly ``gamma`` or
            ``beta``, ``"all"``, or a predicate, a function of a variable. To save the model, register the predicate
            with `keras.saving.register_keras_serializable`.
        perturb_proxies: Whether the scopes ``"norm"`` and ``"all"`` contain the proxies of proxy normalization.
        normalize_bias: Whether `adaptive` is for biases and offsets, too.
        update_moving_statistics: ``"once"``: the second pass starts from the moving statistics, and all other state,
            that the step started from, and leaves no trace. ``"twice"``: both passes update them, as in the code of the
            authors of SAM-ON.
        name: Name of the model.
        **kwargs: Further arguments of `keras.Model`; the dtype policy is by default that of `model`.

    Raises:
        ValueError: If an argument is not one of the above, or, in the first step, if `scope` selects no variable.

    Example:

    >>> import keras, numpy as np
    >>> from keras_proxynorm.training import SharpnessAwareMinimization
    >>> model = keras.Sequential([
    ...     keras.Input((4,)), keras.layers.Dense(8), keras.layers.LayerNormalization(), keras.layers.Dense(1),
    ... ])
    >>> sam = SharpnessAwareMinimization(model, rho=0.5, adaptive="elementwise")
    >>> [variable.name for variable in sam.perturbed_variables]
    ['gamma', 'beta']
    >>> sam.compile("sgd", loss="mse")
    >>> history = sam.fit(np.ones((32, 4)), np.ones((32, 1)), verbose=0)
    >>> prediction = sam.model.predict(np.ones((1, 4)), verbose=0)

    References:

    - [Foret et al., 2021](https://arxiv.org/abs/2010.01412), SAM
    - [Kwon et al., 2021](https://arxiv.org/abs/2102.11600), ASAM
    - [Mueller et al., 2023](https://arxiv.org/abs/2306.04226), SAM-ON
    """

    def __init__(
        self,
        model: keras.Model,
        rho: float = 0.05,
        *,
        adaptive: str | None = None,
        norm: str = "l2",
        eta: float = 0.01,
        scope: str | Callable[[keras.Variable], bool] = "norm",
        perturb_proxies: bool = False,
        normalize_bias: bool = False,
        update_moving_statistics: str = "once",
        name: str | None = None,
        **kwargs: Any,
    ):
        _check("model", model, isinstance(model, keras.Model), "a keras.Model")
        own = [step for step in _STEPS if getattr(type(model), step) is not getattr(keras.Model, step)]
        _check("model", model, not own, f"a keras.Model without {', '.join(_STEPS)} of its own, but has {own}")
        _check("adaptive", adaptive, adaptive in ADAPTIVE, f"one of {ADAPTIVE}")
        _check("norm", norm, norm in NORMS, f"one of {NORMS}")
        _check("scope", scope, scope in ("norm", "all") or callable(scope), '"norm", "all" or a function of a variable')
        for argument, switch in (("perturb_proxies", perturb_proxies), ("normalize_bias", normalize_bias)):
            _check(argument, switch, isinstance(switch, bool), "a boolean")
        times = ("once", "twice")
        _check(
            "update_moving_statistics", update_moving_statistics, update_moving_statistics in times, f"one of {times}"
        )
        # The policy decides about loss scaling, in `compile`.
        super().__init__(name=name, **{"dtype": model.dtype_policy, **kwargs})
        self.model = model
        self.rho = rho
        self.adaptive = adaptive
        self.norm = norm
        self.eta = _radius("eta", eta)
        self.scope = scope
        self.perturb_proxies = perturb_proxies
        self.normalize_bias = normalize_bias
        self.update_moving_statistics = update_moving_statistics
        # Inputs are for the model to convert: what it takes as it is, as integers in float16, must reach it so.
        self._convert_input_args = model._convert_input_args
        self._allow_non_tensor_positional_args = model._allow_non_tensor_positional_args
        self.built = model.built

    @property
    def rho(self) -> float:
        """The radius of the perturbation."""
        return self._rho

    @rho.setter
    def rho(self, rho):
        self._rho = _radius("rho", rho)
        # What is traced has the old one in it.
        self.train_function = None

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)  # also if the `call` of the model does not take it

    @property
    def perturbed_variables(self) -> list[keras.Variable]:
        """The trainable variables that `scope` selects."""
        return [v for v in self.trainable_variables if self._is_perturbed(v)]

    def _is_perturbed(self, variable):
        if callable(self.scope):
            return bool(self.scope(variable))
        if variable.name == "proxy":
            return self.perturb_proxies
        # The "gradient" of a scale of float8 is its next value.
        return variable.name in ("gamma", "beta") or (self.scope == "all" and not variable.overwrite_with_gradient)

    def train_step(self, *arguments):
        if self.rho == 0:
            return super().train_step(*arguments)
        if not self.built:
            # TensorFlow leaves that to the first pass, but before it must be known what is perturbed.
            self(keras.utils.unpack_x_y_sample_weight(arguments[-1])[0])
        if not self.perturbed_variables:
            names = sorted({variable.name for variable in self.trainable_variables})
            raise ValueError(
                "Argument `scope` must select trainable variables of the model; their names are "
                f"{', '.join(names) or 'none'}. Received: scope={self.scope!r}"
            )
        return passes.train_step(self, *arguments)

    def perturb(self, values, gradients, loss_scale):
        """The values of trainable variables, moved to where the loss is higher.

        Args:
            values: Tensors, one for each of the trainable variables.
            gradients: Gradients of the loss times `loss_scale`.
            loss_scale: Number or scalar tensor.
        """
        variables = self.trainable_variables
        chosen = [i for i, variable in enumerate(variables) if self._is_perturbed(variable)]
        moves = perturbations(
            [values[i] for i in chosen],
            [gradients[i] for i in chosen],
            [self.normalize_bias or not variables[i].name.endswith(("bias", "beta")) for i in chosen],
            loss_scale=loss_scale,
            rho=self.rho,
            adaptive=self.adaptive,
            norm=self.norm,
            eta=self.eta,
        )
        moved = list(values)
        for i, move in zip(chosen, moves, strict=True):
            moved[i] = values[i] + ops.cast(move, variables[i].dtype)
        return moved

    def get_config(self):
        return {
            **super().get_config(),
            "model": keras.saving.serialize_keras_object(self.model),
            "rho": self.rho,
            "adaptive": self.adaptive,
            "norm": self.norm,
            "eta": self.eta,
            "scope": keras.saving.serialize_keras_object(self.scope),
            "perturb_proxies": self.perturb_proxies,
            "normalize_bias": self.normalize_bias,
            "update_moving_statistics": self.update_moving_statistics,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        objects = {
            key: keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
            for key in ("model", "scope")
        }
        return cls(**{**config, **objects})


def _radius(argument, number):
    valid = isinstance(number, Real) and not isinstance(number, bool) and 0 <= number < math.inf
    _check(argument, number, valid, "a finite number that is not negative")
    return float(number)


def _check(argument, value, valid, what):
    if not valid:
        raise ValueError(f"Argument `{argument}` must be {what}. Received: {argument}={value!r}")
