"""What is known about each activation: where its kinks are, whether it has a closed form, whether it is elementwise."""

import contextlib
import dataclasses
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import keras
import numpy as np
from keras import activations, ops

from keras_proxynorm.arguments import argument_error
from keras_proxynorm.moments.closed_forms import exponential_moments, rectifier_moments
from keras_proxynorm.moments.precision import Tensor
from keras_proxynorm.moments.quadrature import (
    PIECE_NODES,
    SMOOTH_NODES,
    piecewise_smooth_moments,
    quantile_moments,
    smooth_moments,
)

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
        is_vouched_for: Whether that holds for ever, as for functions of libraries and those that are registered.
        nodes: How many nodes the quadrature takes on each piece between kinks; None for its default.
        is_standard: Whether it is known to be a function of Keras, TensorFlow, JAX or PyTorch, which never changes.
            Others may hold variables or state, or have a gradient that is not the derivative of their values.
    """

    function: Callable
    kinks: tuple[float, ...] = ()
    slopes: tuple[float, ...] | None = None
    exponential: bool = False
    is_vouched_for: bool = True
    nodes: int | None = None
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
            nodes = self.nodes or PIECE_NODES
            return piecewise_smooth_moments(self.function, self.kinks, mean, stddev, nodes, self.is_vouched_for)
        return smooth_moments(self.function, mean, stddev, self.nodes or SMOOTH_NODES)


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

# Where functions are found that are known by identity, if these modules are imported.
_LIBRARIES = (
    *("keras.ops", "tensorflow", "tensorflow.nn", "tensorflow.math"),
    *("jax.nn", "jax.numpy", "torch", "torch.nn.functional"),
)

# Nodes that are enough wherever an unknown function has kinks now, or will have them once its variables have changed.
_NODES_FOR_ANY_KINKS = 1025

# Filled by register_activation: functions, or classes of activation layers, and their kinks. For ever, as with
# keras.saving.register_keras_serializable: what is registered is defined in modules.
_REGISTERED: dict[Hashable, tuple[float, ...]] = {}


def register_activation(fn: Callable, kinks: Iterable[float] = ()) -> Callable:
    """Tells the quadrature where a custom activation has kinks or jumps, for any value of its variables.

    Between its kinks an activation is taken to be smooth, and is integrated piece by piece with few nodes. Without
    registration the quadrature takes ten to twenty times as many, because kinks can be anywhere. Then kinks that are at
    multiples of 1/8 from -8 to 8 when the activation is first looked at are found, and cost no accuracy while they stay
    there. Others leave errors of 1e-5 in units of the output, and of up to 5e-3 in derivatives by `mean` and `stddev`.
    Jumps elsewhere need registration; a warning says so. The functions of `keras.activations` and Keras's activation
    layers are known, and cannot be registered.

    Gradients of the moments of a registered activation are derivatives, at jumps too and of any order. Do not register
    one with kinks whose gradient is not its derivative, such as a straight-through estimator: without registration the
    gradients of its moments are the expectations of the gradient that it has.

    An activation may read variables or other state: its moments are always those of the function as it is now, and pass
    gradients to the variables. To be trained and saved, variables must belong to a layer or a model, as everywhere in
    Keras: assign them to an attribute, as in the second example.

    Args:
        fn: An elementwise function of one tensor, or a class of activation layers without weights.
        kinks: Floats, in the units of the activation's input: every point where the function or one of its first few
            derivatives jumps.

    Returns:
        `fn`, unchanged. If it was registered before, the new kinks replace the old ones, in layers made from then on.

    Raises:
        ValueError: If `fn` is not a function or a class, or is one of Keras, another name of one, or a partial of one;
            or if `kinks` are not finite numbers.

    Examples:

    >>> import keras, keras_proxynorm
    >>> @keras.saving.register_keras_serializable("my_package")
    ... def double_relu(x):
    ...     return keras.ops.relu(x - 1) - keras.ops.relu(-x - 1)
    >>> _ = keras_proxynorm.register_activation(double_relu, kinks=(-1, 1))
    >>> mean, variance = keras_proxynorm.activation_moments(double_relu, 0.0, 1.0)
    >>> print(f"{float(variance):.5f}")
    0.15068

    A slope that is trained and saved:

    >>> @keras.saving.register_keras_serializable("my_package")
    ... class LearnedSlope(keras_proxynorm.GroupNormProxy):
    ...     def __init__(self, groups=32, **kwargs):
    ...         slope = keras.Variable(0.25, name="slope")
    ...         def leaky(x):
    ...             return keras.ops.maximum(x, slope * x)
    ...         keras_proxynorm.register_activation(leaky, kinks=(0,))
    ...         super().__init__(groups, activation=leaky, **kwargs)
    ...         self.slope = slope
    ...     def get_config(self):
    ...         config = super().get_config()
    ...         del config["activation"]
    ...         return config
    >>> [weight.name for weight in LearnedSlope(4).trainable_variables]
    ['slope']
    """
    if not callable(fn) or not isinstance(fn, Hashable) or isinstance(fn, keras.layers.Layer):
        raise argument_error("fn", fn, "a function of one tensor or a class of activation layers, not an instance")
    if _is_known(fn):
        raise argument_error("fn", fn, "an activation of your own: this one is known, and others use it too")
    try:
        points = tuple(sorted({float(kink) for kink in kinks}))
    except (TypeError, ValueError):
        points = (float("nan"),)
    if not np.all(np.isfinite(points)):
        raise argument_error("kinks", kinks, "an iterable of finite numbers")
    _REGISTERED[fn] = points
    return fn


def _is_known(fn):
    while isinstance(fn, functools.partial):
        fn = fn.func
    module = getattr(fn, "__module__", None) or ""
    return module.split(".")[0] == "keras" or (_is_of_a_library(fn) and _shape_in_keras(fn) is not None)


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
    if type(function) is keras.layers.Activation:
        return resolve_activation(function.activation)
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
    if not all(isinstance(value, (int, float, np.generic, type(None))) for value in arguments.values()):
        known = None  # A variable among them, which will change.
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


def _is_of_a_library(function):
    """Whether `function` is a public function of Keras, TensorFlow, JAX or PyTorch: the very object."""
    name = getattr(function, "__name__", None)
    return isinstance(name, str) and any(getattr(_imported(path), name, None) is function for path in _LIBRARIES)


def _imported(path):
    """The module at `path` if its library is imported, else None."""
    library, *names = path.split(".")
    return functools.reduce(lambda module, name: getattr(module, name, None), names, sys.modules.get(library))


@functools.cache
def _shape_in_keras(function):
    """The shape of the elementwise function of Keras that a function of a library equals, or None."""
    values = _evaluate(function, _PROBE)
    candidates: list[tuple[Callable, dict]] = [(known, {}) for known in _SHAPES if known is not activations.threshold]
    # Defaults of other libraries.
    candidates += [(activations.gelu, {"approximate": True}), (activations.leaky_relu, {"negative_slope": 0.01})]
    for known, arguments in candidates:
        if _same(values, _evaluate(functools.partial(known, **arguments), _PROBE)):
            return _SHAPES[known](**arguments)
    return None


def _evaluate(function, x):
    with _outside_of_traces():
        return ops.convert_to_numpy(function(ops.convert_to_tensor(x)))


def _examine(function, activation):
    """Checks by evaluation that an unknown function is elementwise, and looks for its kinks.

    What is found holds for the function as it is now. Later it may have other kinks, so the quadrature does not rely on
    them.
    """
    parts = (_PROBE, _PROBE.reshape(-1, 1), _PROBE[3:7, 2:9])
    try:
        whole, column, block = values = [_evaluate(function, x) for x in parts]
    except Exception as error:
        if _works_in_this_trace(function):
            return ElementwiseActivation(function, is_vouched_for=False, nodes=_NODES_FOR_ANY_KINKS)
        fault = f"which fails with {type(error).__name__}: {error}"
        raise argument_error("activation", activation, "callable with one float tensor of any shape", fault) from error
    if [x.shape for x in values] != [x.shape for x in parts] or not (
        _same(whole.reshape(-1, 1), column) and _same(whole[3:7, 2:9], block)
    ):
        raise _not_elementwise(activation)
    shape = _shape_in_keras(function) if _is_of_a_library(function) else None
    if shape is not None:
        return ElementwiseActivation(function, **shape, is_standard=True)
    kinks = _find_kinks(function)
    # Gauss-Legendre nodes are less dense in the middle of their piece.
    nodes = max(PIECE_NODES, 2 * _NODES_FOR_ANY_KINKS // (len(kinks) + 1)) if kinks else _NODES_FOR_ANY_KINKS
    examined = ElementwiseActivation(function, kinks, is_vouched_for=False, nodes=nodes)
    inaccuracy = _inaccuracy(examined)
    if inaccuracy > 3e-5:
        warnings.warn(
            f"The moments of the activation {activation!r} will be off by about {inaccuracy:.0e}, because it does not "
            "look smooth, or grows fast. If it has kinks or jumps, say where with "
            "keras_proxynorm.register_activation(fn, kinks=(...)); if it is right as it is, register it without kinks.",
            stacklevel=2,
        )
    return examined


def _works_in_this_trace(function):
    """Whether `function` can be called here, though it has no values: it reads a tensor that is being traced."""
    try:
        return tuple(function(ops.convert_to_tensor(_PROBE)).shape) == _PROBE.shape
    except Exception:  # The function is the user's.
        return False


def _find_kinks(function):
    """The kinks and jumps of a function at multiples of 1/8 from -8 to 8, where nearly all of them are.

    When the step of a difference doubles, the second difference of a smooth function grows by a factor of 4, and at a
    kink by 2; the first difference grows by 2, and at a jump by 1.
    """
    points, step = np.arange(-64, 65) / 8, 1 / 64
    offsets = step * np.array([[-2], [-1], [0], [1], [2]])
    values = _evaluate(function, (points + offsets).astype("float32"))
    far_left, left, middle, right, far_right = values.astype("float64")
    with np.errstate(invalid="ignore"):
        tolerance = 1e-5 * (1 + np.nanmax(np.abs(middle)))
        second, first = np.abs(left - 2 * middle + right), np.abs(right - left)
        is_kink = (second > tolerance) & (np.abs(far_left - 2 * middle + far_right) < 3 * second)
        is_jump = (first > tolerance) & (np.abs(far_right - far_left) < 1.5 * first)
    kinks = tuple(points[is_kink | is_jump].tolist())
    # More are a staircase with small steps, or rounding: no pieces to integrate one by one.
    return kinks if len(kinks) <= 32 else ()


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


def _inaccuracy(activation):
    """How far the quadrature is from one on other pieces, in units of the output; smooth functions have the same."""
    mean, stddev = np.tile(np.linspace(-4.1, 3.9, 33), 2), np.repeat([1.0, 2.0], 33)
    other = dataclasses.replace(activation, kinks=(-5.31, -1.73, 0.37, 2.93, *activation.kinks))
    with _outside_of_traces():
        mean, stddev = (ops.convert_to_tensor(x, dtype="float32") for x in (mean, stddev))
        (mean, variance), (other_mean, other_variance) = (
            [ops.convert_to_numpy(x) for x in each.moments(mean, stddev)] for each in (activation, other)
        )
    scale = np.sqrt(other_variance + 0.03)
    error = np.abs(mean - other_mean) / scale + np.abs(np.sqrt(variance + 0.03) / scale - 1)
    return float(np.max(error, initial=0.0, where=np.isfinite(error)))
