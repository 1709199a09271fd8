"""Filter response normalization and its threshold against NumPy."""

import numpy as np
import pytest
from backends import numpy, tensors
from baselines.samples import built, normal

from keras_proxynorm.baselines import FilterResponseNormalization


def test_inputs_without_positions_are_warned_about():
    layer = FilterResponseNormalization(name="norm")
    assert layer.values_per_statistic((None, 3, 5, 8)) == 15
    assert layer.values_per_statistic((None, None, 8)) is None
    for shape in ((None, 8), (None, 1, 1, 8)):
        assert layer.values_per_statistic(shape) == 1
        with pytest.warns(UserWarning, match="'norm' has inputs of shape .*None.*little more than its sign is left"):
            FilterResponseNormalization(name="norm").build(shape)


@pytest.mark.parametrize("nonlinearity", [True, False])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_values(nonlinearity, epsilon):
    layer = built(lambda: FilterResponseNormalization(nonlinearity=nonlinearity, epsilon=epsilon), (None, 3, 5, 8))
    layer.learned_epsilon.assign(-epsilon)  # its size counts
    x = normal(4, 3, 5, 8) * 2 + 1
    power = np.mean(np.square(x.astype("float64")), axis=(1, 2), keepdims=True)
    expected = numpy(layer.gamma.value) * x / np.sqrt(power + epsilon) + numpy(layer.beta.value)
    if nonlinearity:
        expected = np.maximum(expected, numpy(layer.tau.value))
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-5, atol=1e-5)


def test_it_starts_with_relu():
    x = normal(2, 6, 6, 4)
    plain, layer = (numpy(FilterResponseNormalization(nonlinearity=n)(*tensors(x))) for n in (False, True))
    np.testing.assert_array_equal(layer, np.maximum(plain, 0))
    np.testing.assert_allclose(np.square(plain).mean((1, 2)), 1, rtol=1e-4)


@pytest.mark.parametrize("learn_epsilon", [True, False])
def test_weights(learn_epsilon):
    layer = FilterResponseNormalization(learn_epsilon=learn_epsilon, epsilon=0.25)
    layer.build((None, 4, 4, 8))
    assert float(numpy(layer.learned_epsilon.value)) == 0.25
    names = {weight.name for weight in layer.trainable_weights}
    assert names == {"gamma", "beta", "tau"} | ({"learned_epsilon"} if learn_epsilon else set())
