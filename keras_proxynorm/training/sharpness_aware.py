"""Sharpness-aware minimization as a model around a model: SAM and ASAM of all weights, or of normalization only."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_proxynorm.arguments import argument_error, as_boolean, as_choice, as_nonnegative
from keras_proxynorm.compat import convert_arguments_like
from keras_proxynorm.training import passes
from keras_proxynorm.training.perturbation import ADAPTIVE, NORMS, perturbations

__all__ = ["SharpnessAwareMinimization"]

_STEPS = ("train_step", "test_step", "compute_loss", "compute_metrics")


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class SharpnessAwareMinimization(keras.Model):
    """Trains a model towards flat minima, with gradients at weights that are perturbed to increase the loss.

    Each step takes the gradient ``g`` at the weights ``w``, computes a perturbation ``e`` that increases the loss, and
    takes the gradient at ``w + e``, on the same batch and with the same dropout. The optimizer applies that gradient at
    ``w``, with its weight decay and its momentum. A step costs two. With ``norm="l2"``, ``e = rho * T^2 g / |T g|``,
    where the norm is taken over all perturbed variables; with ``norm="linf"``, ``e = rho * T sign(g)``. `adaptive`
    chooses ``T``.

    By default only gamma and beta of normalization layers are perturbed (SAM-ON); the optimizer still updates all
    weights. They need a larger `rho` than all weights do: the authors of SAM-ON use 0.5, and 10 with ``"elementwise"``
    and `normalize_bias`. The default `rho` of 0.05 is that of SAM, `eta` that of ASAM; the default scope, and that
    proxies are not perturbed by default, are choices of this project.

    Compile and fit it as any model: data, sample weights, callbacks, mixed precision, XLA, `steps_per_execution` and
    saving work as usual. The loss and metrics of training are those of the first pass, at ``w``. The model shares its
    weights with ``.model``, which is the model to export. A step is that of `keras.Model`: models with a `train_step`
    or a `compute_loss` of their own are refused.

    - With `tf.distribute`, each replica perturbs by the gradient of its own share of the batch, as the authors of SAM
      do ("m-sharpness"). With JAX's `keras.distribution`, the gradient is that of the whole batch.
    - If a gradient is not finite, nothing is perturbed, and a `keras.optimizers.LossScaleOptimizer` skips the step.
    - What a layer assigns to trainable weights in a call, as `keras.layers.SpectralNormalization` does, it assigns in
      the first pass; the second takes them as they are, perturbed.
    - Layers with a `keras.random.SeedGenerator`, as those of Keras, draw the same random numbers in both passes; other
      random numbers, such as those of functions of the backend, differ.

    Args:
        model: The `keras.Model` to train.
        rho: The radius of the perturbation. It can be set at any time, for example by a callback, and takes effect at
            the next step, without a new trace. With 0, steps are those of the optimizer, for the price of two.
        adaptive: None for SAM, ``T = 1``. For ASAM, ``"elementwise"``, ``T = |w| + eta``, or ``"layerwise"``,
            ``T = (1 + eta) * |w|`` with the Euclidean norm of each variable. Variables whose names end with ``bias`` or
            ``beta`` keep ``T = 1``.
        norm: ``"l2"`` or ``"linf"``.
        eta: With ``"elementwise"``, keeps ``T`` of small weights away from 0: with 0, weights that start at 0 are not
            perturbed. With ``"layerwise"``, a relative increase, so that a variable of zeros is never perturbed.
        scope: The trainable variables to perturb: ``"norm"`` for those named exactly ``gamma`` or ``beta``, ``"all"``,
            or a predicate, a function of a variable. To save the model, register the predicate with
            `keras.saving.register_keras_serializable`.
        perturb_proxies: Whether the scopes ``"norm"`` and ``"all"`` contain the proxies of proxy normalization.
        normalize_bias: Whether `adaptive` applies to biases and beta, too.
        update_moving_statistics: ``"once"``: the second pass starts from the moving statistics, and all other state,
            at the start of the step, and leaves no trace. ``"twice"``: both passes update them, as in the code of the
            authors of SAM-ON.
        name: Name of the model.
        **kwargs: Further arguments of `keras.Model`; the dtype policy defaults to that of `model`.

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
    ) -> None:
        _check_model(model)
        if not callable(scope) and not (isinstance(scope, str) and scope in ("norm", "all")):
            raise argument_error("scope", scope, '"norm", "all" or a function of a variable')
        # By the policy, `compile` decides about loss scaling.
        super().__init__(name=name, **{"dtype": model.dtype_policy, **kwargs})
        self.model = model
        self._rho = as_nonnegative("rho", rho)
        # State that a trace reads, but no weight, which would be saved; so Keras is not to find it.
        object.__setattr__(self, "rho_variable", _scalar_state(self._rho, "rho"))
        self.adaptive = as_choice("adaptive", adaptive, ADAPTIVE)
        self.norm = as_choice("norm", norm, NORMS)
        self.eta = as_nonnegative("eta", eta)
        self.scope = scope
        self.perturb_proxies = as_boolean("perturb_proxies", perturb_proxies)
        self.normalize_bias = as_boolean("normalize_bias", normalize_bias)
        self.update_moving_statistics = as_choice(
            "update_moving_statistics", update_moving_statistics, ("once", "twice")
        )
        # The model converts its inputs itself: integers, for example, must not become float16 before.
        convert_arguments_like(self, model)
        self.built = model.built

    @property
    def rho(self) -> float:
        """The radius of the perturbation."""
        return self._rho

    @rho.setter
    def rho(self, rho: float) -> None:
        self._rho = as_nonnegative("rho", rho)
        if keras.backend.backend() == "jax":
            # During `fit` Keras has the state in arrays, and writes them to the variables later.
            self.jax_state_sync()
        self.rho_variable.assign(self._rho)

    @property
    def variables(self) -> list[keras.Variable]:
        return [*super().variables, self.rho_variable]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.model(inputs, training=training)  # even if the `call` of the model does not take it

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

    def train_step(self, *arguments: Any) -> Any:
        if not self.built:
            # TensorFlow builds in the first pass, but the perturbed variables must be known before.
            self(keras.utils.unpack_x_y_sample_weight(arguments[-1])[0])
        if not self.perturbed_variables:
            if self.rho == 0:
                return super().train_step(*arguments)
            names = sorted({variable.name for variable in self.trainable_variables})
            raise ValueError(
                "Argument `scope` must select trainable variables of the model; their names are "
                f"{', '.join(names) or 'none'}. Received: scope={self.scope!r}"
            )
        return passes.train_step(self, *arguments)

    def perturb(self, values: Sequence, gradients: Sequence, loss_scale: Any, rho: Any) -> list:
        """The values of the trainable variables with the perturbation added.

        Args:
            values: Tensors, one for each of the trainable variables.
            gradients: Gradients of the loss times `loss_scale`.
            loss_scale: Number or scalar tensor.
            rho: The radius, a number or a scalar tensor.
        """
        variables = self.trainable_variables
        chosen = [i for i, variable in enumerate(variables) if self._is_perturbed(variable)]
        moves = perturbations(
            [values[i] for i in chosen],
            [gradients[i] for i in chosen],
            [self.normalize_bias or not variables[i].name.endswith(("bias", "beta")) for i in chosen],
            loss_scale=loss_scale,
            rho=rho,
            adaptive=self.adaptive,
            norm=self.norm,
            eta=self.eta,
        )
        moved = list(values)
        for i, move in zip(chosen, moves, strict=True):
            moved[i] = values[i] + ops.cast(move, variables[i].dtype)
        return moved

    def get_config(self) -> dict[str, Any]:
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
    def from_config(cls, config: dict[str, Any], custom_objects: dict | None = None) -> "SharpnessAwareMinimization":
        objects = {
            key: keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
            for key in ("model", "scope")
        }
        return cls(**{**config, **objects})


def _scalar_state(value, name):
    return keras.Variable(
        value, dtype="float32", trainable=False, autocast=False, aggregation="only_first_replica", name=name
    )


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise argument_error("model", model, "a keras.Model")
    own = [step for step in _STEPS if getattr(type(model), step) is not getattr(keras.Model, step)]
    if own:
        raise argument_error("model", model, f"a keras.Model without {', '.join(_STEPS)} of its own, but has {own}")
