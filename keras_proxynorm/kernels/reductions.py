"""Sums over the positions of each sample and channel, in the way that is fast and exact on the device at hand."""

import contextvars
import math

import keras
from keras import ops

from keras_proxynorm.arguments import as_choice
from keras_proxynorm.compat import is_compiled_by_xla
from keras_proxynorm.moments import Tensor

__all__ = ["position_sums", "reduction", "reduction_method", "set_reduction"]

_METHODS = ("auto", "matmul", "pool", "sum")
_LONGEST_SUM = 4096
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
    rank = len(x.shape)
    axes = tuple(i for i in range(1, rank) if i != axis)
    if not axes:
        return x
    method = reduction_method(x)
    if None in x.shape[1:] or method == "sum":
        for chunk in _chunks(axes, x.shape):
            x = ops.sum(x, axis=chunk, keepdims=True)
        return x
    shape, batch = x.shape, -1 if x.shape[0] is None else x.shape[0]
    before, after = ([i for i in axes if i < axis], [i for i in axes if i > axis])
    for chunk in _chunks(after, shape):
        length = math.prod(shape[i] for i in chunk)
        x = ops.matmul(ops.reshape(x, (-1, length)), ops.ones((length, 1), x.dtype))
    # XLA makes a slow loop of a product for one sample alone; its rows are several.
    for chunk in _chunks(before, shape, 1 if method == "matmul" and batch == 1 else _LONGEST_SUM):
        length = math.prod(shape[i] for i in chunk)
        if method == "pool":
            x = ops.reshape(x, (-1, length, 1, shape[axis]))
            x = ops.average_pool(x, (length, 1), (length, 1), data_format="channels_last")
        else:
            x = ops.reshape(x, (-1, length, shape[axis]))
            # As many rows of ones as samples: XLA makes a slow loop of a product with one row for all.
            x = ops.matmul(ops.ones((ops.shape(x)[0], 1, length), x.dtype), x)
    x = ops.reshape(x, (batch, *(shape[i] if i == axis else 1 for i in range(1, rank))))
    return x * math.prod(shape[i] for i in before) if method == "pool" else x


def _chunks(axes, shape, longest=_LONGEST_SUM):
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
