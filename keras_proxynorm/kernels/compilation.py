"""What XLA must be told, because it would otherwise move small computations to where they cost much."""

import keras

__all__ = ["barrier", "is_compiled_by_xla"]


def barrier(x):
    """`x`, whose computation XLA does not merge with those behind it; elsewhere just `x`."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.lax.optimization_barrier(x)
    if backend != "tensorflow" or not is_compiled_by_xla():
        return x
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    @tf.custom_gradient
    def identity(x):
        return gen_xla_ops.xla_optimization_barrier(input=[x])[0], lambda upstream: upstream

    return identity(x)


def is_compiled_by_xla() -> bool:
    """Whether TensorFlow is tracing a function for XLA."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
