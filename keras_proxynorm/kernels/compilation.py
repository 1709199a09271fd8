"""What XLA must be told, because it would otherwise move small computations to where they cost much."""

import keras
from keras import ops

from keras_proxynorm.compat import is_compiled_by_xla, xla_optimization_barrier, xla_reduce_precision
from keras_proxynorm.moments import Tensor

__all__ = ["barrier", "rounded"]

# Of a float: the bits of its exponent, and those of its mantissa but one.
_BITS = {"float32": (8, 22), "float64": (11, 51)}


def barrier(x: Tensor) -> Tensor:
    """`x`, whose computation XLA does not merge with those after it; elsewhere just `x`."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.optimization_barrier(x)
    if keras.backend.backend() != "tensorflow" or not is_compiled_by_xla():
        return x
    import tensorflow as tf

    return tf.custom_gradient(lambda x: (xla_optimization_barrier(x), lambda upstream: upstream))(x)


def rounded(x: Tensor) -> Tensor:
    """`x` as a constant for gradients, and under XLA as the same number wherever it is computed.

    XLA computes small tensors anew for those that read them. A product that is then subtracted becomes one instruction
    with the subtraction, which does not round the product; where it is added again, it has been rounded. What is
    rounded to a bit less than the instructions do is the same everywhere.
    """
    x = ops.stop_gradient(x)
    bits = _BITS.get(keras.backend.standardize_dtype(x.dtype))
    if bits is None:
        return x
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.reduce_precision(x, *bits)
    if keras.backend.backend() == "tensorflow" and is_compiled_by_xla():
        return xla_reduce_precision(x, *bits)
    return x
