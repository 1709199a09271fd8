"""What XLA must be told, because it would otherwise move small computations to where they cost much."""

import keras

from keras_proxynorm.compat import is_compiled_by_xla, xla_optimization_barrier
from keras_proxynorm.moments import Tensor

__all__ = ["barrier"]


def barrier(x: Tensor) -> Tensor:
    """`x`, whose computation XLA does not merge with those after it; elsewhere just `x`."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.optimization_barrier(x)
    if keras.backend.backend() != "tensorflow" or not is_compiled_by_xla():
        return x
    import tensorflow as tf

    return tf.custom_gradient(lambda x: (xla_optimization_barrier(x), lambda upstream: upstream))(x)
