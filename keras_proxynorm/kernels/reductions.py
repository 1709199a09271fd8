"""Sums over the positions of each sample and channel, in the way that is fast and exact on the device at hand."""

import contextvars
import math

import keras
from keras import ops

from keras_proxynorm.arguments import as_choice
from keras_proxynorm.compat import is_compiled_by_xla
from keras_proxynorm.kernels.compilation import barrier
from keras_proxynorm.moments import Tensor

__all__ = ["axis_sums", "position_sums", "reduction", "reduction_method", "set_reduction"]

_METHODS = ("auto", "matmul", "pool", "sum")
# How many values are summed at once: where they are added one by one; where XLA or PyTorch do it better; and at least,
# where a long axis is divided. Of an axis of unknown size these are the pieces.
_LONGEST_SEQUENCE, _LONGEST_SUM, _SHORTEST_SUM, _OPEN_PIECE = 256, 4096, 16, 1024
_SMALLEST_POOLED, _USUAL_BATCH_SIZE = 2**20, 8

_of_process = "auto"
# The methods of the `with` blocks that the running thread is in, the innermost last.
_of_blocks: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("reduction", default=())


class reduction:
    """A context in which the layers sum over the positions of a sample by one method.

    On a CPU, average pooling over the whole image is the fastest reduction of a large tensor that TensorFlow has, and
    for XLA a product with a vector of ones, by far. On an accelerator a float32 product may be computed in TF32 or
    bfloat16, which is no longer a sum. The layers choose by the device that they find when they are traced. Choose for
    them when you trace on one device for another.

    The context belongs to the thread that enters it, and contexts can be nested. Other threads do not see it, nor do
    threads that start inside it, as `tf.distribute.MirroredStrategy` starts for its replicas: `set_reduction` reaches
    them. A function that is traced already keeps what it was traced with.

    Args:
        method: ``"auto"``, ``"matmul"``, ``"pool"`` or ``"sum"``. Automatic is, on a CPU, ``"pool"`` for large tensors
            in TensorFlow and ``"matmul"`` in XLA, on TensorFlow and JAX; anything else sums.
            `keras_proxynorm.export` always uses ``"sum"``.

    Raises:
        ValueError: If the method is unknown.

    Example:

    >>> import keras, keras_proxynorm
    >>> layer = keras_proxynorm.GroupNormProxy(groups=2)
    >>> with keras_proxynorm.reduction("sum"):
    ...     y = layer(keras.ops.ones((1, 8, 8, 4)))
    """

    def __init__(self, method: str) -> None:
        self._method = as_choice("method", method, _METHODS)

    def __enter__(self) -> "reduction":
        _of_blocks.set((*_of_blocks.get(), self._method))
        return self

    def __exit__(self, *exception: object) -> None:
        _of_blocks.set(_of_blocks.get()[:-1])


def set_reduction(method: str) -> None:
    """Sets how the layers sum over the positions of a sample, for all threads, outside of `reduction` contexts.

    Args:
        method: As in `reduction`, where the methods are explained. ``"auto"`` is the setting at the start.

    Raises:
        ValueError: If the method is unknown.

    Example:

    >>> import keras_proxynorm
    >>> keras_proxynorm.set_reduction("sum")  # from here on
    >>> keras_proxynorm.set_reduction("auto")  # as at the start
    """
    global _of_process
    _of_process = as_choice("method", method, _METHODS)


def position_sums(x: Tensor, axis: int) -> Tensor:
    """Sums over all axes but the batch and `axis`.

    Args:
        x: Float tensor of rank 2 or more; axis 0 is the batch.
        axis: Index of the channel axis, positive.

    Returns:
        A tensor of the rank and dtype of `x`, with size 1 where it was summed.
    """
    axes, shape = [i for i in range(1, len(x.shape)) if i != axis], x.shape
    if not axes:
        return x
    method = reduction_method(x)
    if None in shape[1:] or method == "sum":
        for chunk in _chunks(axes, shape, _longest_sum()):
            # Of two sums in a row XLA makes one.
            x = axis_sums(x, *chunk) if len(chunk) == 1 else barrier(ops.sum(x, axis=chunk, keepdims=True))
        return x
    for i in axes:
        if _factors(shape[i], _LONGEST_SEQUENCE) is None:
            start, rest = _start_and_rest(x, i)
            return position_sums(start, axis) + position_sums(rest, axis)
    batch = -1 if shape[0] is None else shape[0]
    before, after = (
        [n for i in group for n in _factors(shape[i], _LONGEST_SEQUENCE)]
        for group in (range(1, axis), axes[axis - 1 :])
    )
    for chunk in _chunks(range(len(after)), after, _LONGEST_SEQUENCE):
        length = math.prod(after[i] for i in chunk)
        x = ops.matmul(ops.reshape(x, (-1, length)), ops.ones((length, 1), x.dtype))
    # XLA makes a slow loop of a product for one sample alone; its rows are several.
    longest = 1 if method == "matmul" and batch == 1 else _LONGEST_SEQUENCE
    for chunk in _chunks(range(len(before)), before, longest):
        length = math.prod(before[i] for i in chunk)
        if method == "pool":
            x = ops.reshape(x, (-1, length, 1, shape[axis]))
            x = ops.average_pool(x, (length, 1), (length, 1), data_format="channels_last")
        else:
            x = ops.reshape(x, (-1, length, shape[axis]))
            # As many rows of ones as samples: XLA makes a slow loop of a product with one row for all.
            x = ops.matmul(ops.ones((ops.shape(x)[0], 1, length), x.dtype), x)
    x = ops.reshape(x, (batch, *(size if i == axis else 1 for i, size in enumerate(shape[1:], 1))))
    return x * math.prod(before) if method == "pool" else x


def axis_sums(x: Tensor, axis: int) -> Tensor:
    """Sums along one axis of any length, with size 1 there: first of pieces, because long sums lose digits."""
    size = x.shape[axis]
    factors = None if size is None else _factors(size, _longest_sum())
    if factors is not None:
        return _sums_by_factors(x, axis, factors)
    start, rest = _start_and_rest(x, axis)
    if size is None:
        return _sums_by_factors(start, axis, (-1, _OPEN_PIECE)) + ops.sum(rest, axis=axis, keepdims=True)
    return axis_sums(start, axis) + axis_sums(rest, axis)


def _sums_by_factors(x, axis, factors):
    if len(factors) > 1:
        sizes = ops.shape(x)
        x = ops.reshape(x, (*sizes[:axis], *factors, *sizes[axis + 1 :]))
        for i in range(axis + len(factors) - 1, axis, -1):
            x = barrier(ops.sum(x, axis=i))
    return barrier(ops.sum(x, axis=axis, keepdims=True))


def _longest_sum():
    in_sequence = keras.backend.backend() == "tensorflow" and not is_compiled_by_xla()
    return _LONGEST_SEQUENCE if in_sequence else _LONGEST_SUM


def _factors(size, longest):
    """Lengths of sums, one after the other, that make up a known size; None if it has no suitable divisors."""
    if size <= longest:
        return [size]
    divisor = next((n for n in range(longest, _SHORTEST_SUM - 1, -1) if size % n == 0), None)
    others = divisor and _factors(size // divisor, longest)
    return others and [*others, divisor]


def _start_and_rest(x, axis):
    """Two parts of an axis, of which the first consists of whole pieces: if the size is known, `_factors` has them."""
    size = ops.shape(x)[axis]
    piece = _OPEN_PIECE if x.shape[axis] is None else _LONGEST_SEQUENCE ** int(math.log(size, _LONGEST_SEQUENCE))
    before, whole = (slice(None),) * axis, size // piece * piece
    return x[(*before, slice(None, whole))], x[(*before, slice(whole, None))]


def _chunks(axes, shape, longest):
    """Axes to sum over together, the last ones first: long sums are less exact, and many short ones are slow."""
    chunks: list[tuple[int, ...]] = []
    length = math.inf
    for axis in reversed(axes):
        size = math.inf if shape[axis] is None else shape[axis]
        if length * size <= longest:
            chunks[-1], length = (axis, *chunks[-1]), length * size
        else:
            chunks.append((axis,))
            length = size
    return chunks


def reduction_method(x: Tensor) -> str:
    """How sums over `x` are computed: by the innermost context, by the setting of the process, or by the device."""
    method = (_of_process, *_of_blocks.get())[-1]
    if method != "auto":
        return method
    backend = keras.backend.backend()
    if backend == "tensorflow" and _tensorflow_device(x) == "CPU":
        if is_compiled_by_xla():
            return "matmul"
        # Pooling is faster and starts slower.
        known = None not in x.shape[1:] and (x.shape[0] or _USUAL_BATCH_SIZE) * math.prod(x.shape[1:])
        return "pool" if known and known >= _SMALLEST_POOLED else "sum"
    if backend == "jax":
        import jax

        return "matmul" if jax.default_backend() == "cpu" else "sum"
    return "sum"


def _tensorflow_device(x) -> str:
    """The type of the device that operations on `x` are placed on."""
    import tensorflow as tf

    # A graph knows the devices that the user asked for; the others are chosen when it runs.
    name = x.device if tf.executing_eagerly() else tf.no_op().device
    device = tf.DeviceSpec.from_string(name).device_type if name else None
    accelerators = {device.device_type for device in tf.config.list_logical_devices()} & {"GPU", "TPU"}
    return device or (accelerators.pop() if accelerators else "CPU")
