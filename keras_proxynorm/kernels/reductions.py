"""Sums over the positions of each sample and channel, in the way that is fast and exact on the device at hand."""

import math

import keras
from keras import ops

from keras_proxynorm.kernels.compilation import is_compiled_by_xla

__all__ = ["position_sums", "reduction", "reduction_method"]

_METHODS = ("auto", "matmul", "pool", "sum")
_method = "auto"
_LONGEST_SUM = 4096
_SMALLEST_POOLED, _USUAL_BATCH_SIZE = 2**20, 8


class reduction:
    """Sets how the layers sum over the positions of a sample: as a setting, or for a block of code.

    On a CPU, average pooling over the whole image is the fastest reduction of a large tensor that TensorFlow has, and
    for XLA a product with a vector of ones, by far. On an accelerator a float32 product may be computed in TF32 or
    bfloat16, which is no longer a sum. The layers choose by the device that they find when they are traced. Choose for
    them when you trace on one device for another:

    Args:
        method: ``"auto"`` (the default), ``"matmul"``, ``"pool"`` or ``"sum"``. Automatic is, on a CPU, ``"pool"`` for
            large tensors in TensorFlow and ``"matmul"`` in XLA, on TensorFlow and JAX; anything else sums.
            `keras_proxynorm.export` always uses ``"sum"``.

    Calling it changes the setting of the process, for all threads; as a context manager it restores the previous one.
    A function that is traced already keeps what it was traced with.

    Raises:
        ValueError: If the method is unknown.

    Example:

    >>> import keras, keras_proxynorm
    >>> layer = keras_proxynorm.GroupNormProxy(groups=2)
    >>> with keras_proxynorm.reduction("sum"):
    ...     y = layer(keras.ops.ones((1, 8, 8, 4)))
    >>> _ = keras_proxynorm.reduction("auto")  # the setting from here on
    """

    def __init__(self, method: str):
        global _method
        if method not in _METHODS:
            raise ValueError(f"Argument `method` must be one of {_METHODS}. Received: method={method!r}")
        self._method = method
        self._previous, _method = _method, method

    def __enter__(self):
        global _method
        if _method != self._method:  # entered again, or another one was set in between
            self._previous, _method = _method, self._method
        return self

    def __exit__(self, *exception):
        global _method
        _method = self._previous


def position_sums(x, axis: int):
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
    """Axes to sum over together, the last ones first: long sums lose digits, and many short ones take time."""
    chunks, length = [], math.inf
    for axis in reversed(axes):
        size = math.inf if shape[axis] is None else shape[axis]
        if length * size <= longest:
            chunks[-1], length = (axis, *chunks[-1]), length * size
        else:
            chunks.append((axis,))
            length = size
    return chunks


def reduction_method(x) -> str:
    """How sums over `x` are computed, by the setting or by the device."""
    if _method != "auto":
        return _method
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
