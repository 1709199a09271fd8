"""What XLA is told not to merge."""

import numpy as np
import pytest
from backends import MODES, compiled, gradients, numpy, tensorflow_only, tensors
from keras import ops

from keras_proxynorm.kernels.compilation import barrier


@pytest.mark.parametrize("mode", MODES)
def test_barrier_is_the_identity(mode):
    x = np.arange(6, dtype="float32").reshape(2, 3)

    def cubes(x):
        return ops.sum(ops.power(barrier(x), 3))

    def penalty(x):
        return ops.sum(ops.square(gradients(cubes, x)[0]))

    np.testing.assert_array_equal(numpy(compiled(barrier, mode)(*tensors(x))), x)
    np.testing.assert_allclose(numpy(compiled(lambda x: gradients(cubes, x)[0], mode)(*tensors(x))), 3 * x**2)
    np.testing.assert_allclose(numpy(compiled(lambda x: gradients(penalty, x)[0], mode)(*tensors(x))), 36 * x**3)


@tensorflow_only
def test_barrier_reaches_xla():
    import tensorflow as tf

    function = tf.function(lambda x: barrier(x + 1) + 1, jit_compile=True)
    assert "opt-barrier" in function.experimental_get_compiler_ir(tf.zeros((2,)))(stage="hlo")
