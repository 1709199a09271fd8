"""What is known about each activation: where its kinks are, whether it has a closed form, whether it is elementwise."""

import contextlib
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import keras
import numpy as np
from keras import activations, ops

from keras_proxynorm.arguments import argument_error
from keras_proxynorm.moments.closed_forms import exponential_moments, rectifier_moments
from keras_proxynorm.moments.precision import Tensor
from keras_proxynorm.moments.quadrature import SMOOTH_NODES, piecewise_smooth_moments, quantile_moments, smooth_moments

__all__ = ["METHODS", "ElementwiseActivation", "register_activation", "resolve_activation"]

METHODS = ("exact", "quantiles")


@dataclasses.dataclass(frozen=True)
class ElementwiseActivation:
    """An elementwise function of one tensor with its shape.

    Attributes:
        function: Maps a tensor to a tensor of the same shape.
        kinks: Where the function has a kink or a jump; between them it is smooth.
        slopes: The slopes of a line (one) or of two half-lines that meet at the one kink (two); else None.
        exponential: Whether it is the exponential function.
        nodes: How many nodes the quadrature takes for a smooth function.
        is_standard: Whether it is a function of Keras or TensorFlow. Others may hold variables, or have a gradient that
            is not the derivative of their values.
    """

    function: Callable
    kinks: tuple[float, ...] = ()
    slopes: tuple[float, ...] | None = None
    exponential: bool = False
    nodes: int = SMOOTH_NODES
    is_standard: bool = False

    @property
    def is_identity(self) -> bool:
        return self.slopes == (1.0,)

    @property
    def is_homogeneous(self) -> bool:
        """Whether ``function(r * x)`` is ``r * function(x)`` for every positive ``r``."""
        return self.slopes is not None and all(kink == 0 for kink in self.kinks)

    def moments(
        self, mean: Tensor, stddev: Tensor, method: str = "exact", num_quantiles: int = 256
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of the activation of ``N(mean, stddev ** 2)``; two float tensors of one shape and dtype."""
        if method == "quantiles":
            return quantile_moments(self.function, mean, stddev, num_quantiles)
        if self.is_identity:
            return mean, ops.square(stddev)
        if self.exponential:
            return exponential_moments(mean, stddev)
        if self.slopes is not None:
            (kink,), (left, right) = self.kinks, self.slopes
            return rectifier_moments(kink, left, right, mean, stddev)
        if self.kinks:
            return piecewise_smooth_moments(self.function, self.kinks, mean, stddev)
        return smooth_moments(self.function, mean, stddev, self.nodes)


def _relu_shape(negative_slope=0.0, max_value=None, threshold=0.0):
    if max_value is None and threshold == 0:
        return {"kinks": (0.0,), "slopes": (float(negative_slope), 1.0)}
    return {"kinks": tuple(sorted({float(threshold), float(threshold if max_value is None else max_value)}))}


def _leaky_relu_shape(negative_slope=0.2):
    return {"kinks": (0.0,), "slopes": (float(negative_slope), 1.0)}


def _shrink_shape(threshold=0.5):
    return {"kinks": (-float(threshold), float(threshold))}


def _threshold_shape(threshold, default_value):
    return {"kinks": (float(threshold),)}


def _squareplus_shape(b=4):
    # Smooth, but the closer b comes to 0, the more like relu.
    return {"kinks": (0.0,) if b < 1 else ()}


def _kinks_at(*kinks):
    return lambda **_: {"kinks": kinks}


# For each elementwise function of keras.activations, its shape as a function of its keyword arguments.
_SHAPES: dict[Callable, Callable[..., dict]] = {
    activations.linear: lambda: {"slopes": (1.0,)},
    activations.exponential: lambda: {"exponential": True},
    activations.relu: _relu_shape,
    activations.leaky_relu: _leaky_relu_shape,
    activations.relu6: _kinks_at(0.0, 6.0),
    activations.elu: _kinks_at(0.0),
    activations.selu: _kinks_at(0.0),
    activations.celu: _kinks_at(0.0),
    activations.softsign: _kinks_at(0.0),
    activations.soft_shrink: _shrink_shape,
    activations.hard_shrink: _shrink_shape,
    activations.squareplus: _squareplus_shape,
    activations.threshold: _threshold_shape,
    activations.hard_tanh: _kinks_at(-1.0, 1.0),
    activations.hard_sigmoid: _kinks_at(-3.0, 3.0),
    activations.hard_silu: _kinks_at(-3.0, 3.0),
    activations.sparse_plus: _kinks_at(-1.0, 1.0),
    activations.sparse_sigmoid: _kinks_at(-1.0, 1.0),
    # The nearest singularity of these in the complex plane is at pi i: half the nodes are enough.
    **dict.fromkeys((activations.log_sigmoid, activations.silu, activations.softplus), lambda: {"nodes": 65}),
    **dict.fromkeys(
        (activations.gelu, activations.mish, activations.sigmoid, activations.tanh, activations.tanh_shrink),
        _kinks_at(),
    ),
}

_NOT_ELEMENTWISE = (activations.glu, activations.log_softmax, activations.softmax, activations.sparsemax)

# Filled by register_activation: functions, or classes of activation layers, and their kinks.
_REGISTERED: dict[Hashable, tuple[float, ...]] = {}


def register_activation(fn: Callable, kinks: Iterable[float] = ()) -> Callable:
    """Tells the quadrature where a custom activation has kinks or jumps.

    Between its kinks an activation is taken to be smooth, and is integrated piece by piece. Activations that are
    smooth everywhere need no registration; registering one without kinks vouches for it. The functions of
    `keras.activations` and Keras's activation layers are known already.

    Args:
        fn: An elementwise function of one tensor, or a class of parameter-free activation layers.
        kinks: Floats, in the units of the activation's input: every point where the function or one of its first few
            derivatives jumps.

    Returns:
        `fn`, unchanged.

    Raises:
        ValueError: If `fn` is not a function or a class, or if `kinks` are not finite numbers.

    Example:

    >>> import keras, keras_proxynorm
    >>> @keras.saving.register_keras_serializable("my_package")
    ... def double_relu(x):
    ...     return keras.ops.relu(x - 1) - keras.ops.relu(-x - 1)
    >>> _ = keras_proxynorm.register_activation(double_relu, kinks=(-1, 1))
    >>> mean, variance = keras_proxynorm.activation_moments(double_relu, 0.0, 1.0)
    >>> print(f"{float(variance):.5f}")
    0.15068
    """
    if not callable(fn) or not isinstance(fn, Hashable) or isinstance(fn, keras.layers.Layer):
        raise argument_error("fn", fn, "a function of one tensor or a class of activation layers, not an instance")
    try:
        points = tuple(sorted({float(kink) for kink in kinks}))
    except (TypeError, ValueError):
        points = (float("nan"),)
    if not np.all(np.isfinite(points)):
        raise argument_error("kinks", kinks, "an iterable of finite numbers")
    _REGISTERED[fn] = points
    return fn


def resolve_activation(activation: Any) -> ElementwiseActivation:
    """Finds the function and the shape of anything that Keras takes as an activation.

    Args:
        activation: None, a name, a config, a callable, or a parameter-free Keras activation layer.

    Returns:
        An `ElementwiseActivation`.

    Raises:
        ValueError: If it is unknown, has weights, or does not act on each element alone.
    """
    try:
        function = activations.get(activation)
    except (TypeError, ValueError):
        function = None
    if function is None or inspect.isclass(function):
        names = ", ".join(sorted(known.__name__ for known in _SHAPES if known is not activations.threshold))
        raise argument_error(
            "activation",
            activation,
            f"the name of an activation ({names}), a callable or an instance of a parameter-free Keras layer",
        )
    is_layer = isinstance(function, keras.layers.Layer)
    if is_layer and (isinstance(function, keras.layers.PReLU) or function.weights):
        raise argument_error(
            "activation", activation, "without weights: proxy normalization needs one function for all elements"
        )
    # Not a layer's __call__, which would cast to the layer's own compute dtype.
    call = function.call if is_layer else function
    key = type(function) if is_layer else function
    if isinstance(key, Hashable) and key in _REGISTERED:
        return ElementwiseActivation(call, _REGISTERED[key])

    known, arguments = _unwrap(function)
    if known in _NOT_ELEMENTWISE or isinstance(function, keras.layers.Softmax):
        raise _not_elementwise(activation)
    if known not in _SHAPES:
        return _examine(call, activation)
    try:
        shape = _SHAPES[known](**arguments)
    except TypeError as error:
        raise argument_error(
            "activation",
            activation,
            f"callable with one tensor; {known.__name__} needs other arguments. Wrap it in a function of one tensor",
        ) from error
    function = functools.partial(known, **arguments) if arguments else known
    return ElementwiseActivation(function, **shape, is_standard=True)


def _unwrap(function):
    """The function of keras.activations that `function` stands for, or None, and its keyword arguments."""
    if type(function) is keras.layers.Activation:
        return _unwrap(function.activation)
    if isinstance(function, functools.partial) and not function.args:
        inner, arguments = _unwrap(function.func)
        return inner, {**arguments, **function.keywords}
    if type(function) is keras.layers.ReLU:
        config = {key: getattr(function, key) for key in ("negative_slope", "max_value", "threshold")}
        return activations.relu, config
    if type(function) is keras.layers.LeakyReLU:
        return activations.leaky_relu, {"negative_slope": function.negative_slope}
    if type(function) is keras.layers.ELU:
        return activations.elu, {"alpha": function.alpha}
    if isinstance(function, Hashable) and (function in _SHAPES or function in _NOT_ELEMENTWISE):
        return function, {}
    return None, {}


# Dense around 0 and reaching far out, so that relu is not taken for relu(max_value=20).
_PROBE = np.concatenate([np.linspace(-8.03, 7.97, 81), np.geomspace(9, 9e3, 20), -np.geomspace(9, 9e3, 20)])
_PROBE = _PROBE[:120].reshape(10, 12).astype("float32")


def _examine(function, activation):
    """Checks by evaluation that an unknown function is elementwise, and whether the quadrature is accurate for it."""
    parts = (_PROBE, _PROBE.reshape(-1, 1), _PROBE[3:7, 2:9])
    with _outside_of_traces():
        try:
            values = [ops.convert_to_numpy(function(ops.convert_to_tensor(x))) for x in parts]
        except Exception as error:
            fault = f"which fails with {type(error).__name__}: {error}"
            raise argument_error(
                "activation", activation, "callable with one float tensor of any shape", fault
            ) from error
        whole, column, block = values
        if [x.shape for x in values] != [x.shape for x in parts] or not (
            _same(whole.reshape(-1, 1), column) and _same(whole[3:7, 2:9], block)
        ):
            raise _not_elementwise(activation)
        for known, shape_of in _SHAPES.items():  # tf.nn.relu, keras.ops.relu, a lambda, ...
            if known is not activations.threshold and _same(whole, ops.convert_to_numpy(known(_PROBE))):
                # A layer of Keras, or a tf.function, may be around a function of the user's.
                library = function.__module__.split(".")[0] if inspect.isfunction(function) else None
                return ElementwiseActivation(function, **shape_of(), is_standard=library in ("keras", "tensorflow"))
        inaccuracy = _inaccuracy_as_smooth(function)
    if inaccuracy > 3e-5:
        warnings.warn(
            f"The moments of the activation {activation!r} will be off by about {inaccuracy:.0e}, because it does not "
            "look smooth. If it has kinks or jumps, say where with keras_proxynorm.register_activation(fn, "
            "kinks=(...)); if it is right as it is, register it without kinks.",
            stacklevel=2,
        )
    return ElementwiseActivation(function)


def _outside_of_traces():
    """Where tensors have values, also while a function around it is being traced."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.init_scope()
    if keras.backend.backend() == "jax":
        import jax

        return jax.ensure_compile_time_eval()
    return contextlib.nullcontext()


def _not_elementwise(activation):
    return argument_error(
        "activation",
        activation,
        "a function of each element alone; softmax, log_softmax, glu, sparsemax and so on have no proxy normalization",
    )


def _same(a, b):
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def _inaccuracy_as_smooth(function):
    """How far the rule for smooth functions is from one with ten times as many nodes, in units of the output."""
    mean = ops.convert_to_tensor(np.tile(np.linspace(-4.1, 3.9, 33, dtype="float32"), 2))
    stddev = ops.convert_to_tensor(np.repeat(np.array([1, 2], "float32"), 33))
    coarse_mean, coarse_variance = (ops.convert_to_numpy(x) for x in smooth_moments(function, mean, stddev))
    fine_mean, fine_variance = (ops.convert_to_numpy(x) for x in smooth_moments(function, mean, stddev, nodes=1291))
    scale = np.sqrt(fine_variance + 0.03)
    error = np.abs(coarse_mean - fine_mean) / scale + np.abs(np.sqrt(coarse_variance + 0.03) / scale - 1)
    return float(np.max(error, initial=0.0, where=np.isfinite(error)))
