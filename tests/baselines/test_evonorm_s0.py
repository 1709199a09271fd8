"""EvoNorm-S0 against NumPy."""

import numpy as np
import pytest
from backends import numpy, tensors
from baselines.samples import built, normal

from keras_proxynorm.baselines import EvoNormS0


def test_groups_of_single_values_are_warned_about():
    assert EvoNormS0(4).values_per_statistic((None, 3, 5, 8)) == 30
    assert EvoNormS0(-1).values_per_statistic((None, None, 8)) is None
    assert EvoNormS0(8, nonlinearity=False).values_per_statistic((None, 8)) is None
    with pytest.warns(UserWarning, match="'norm' has inputs of shape .*None, 8.*only `epsilon` divides them"):
        EvoNormS0(8, name="norm").build((None, 8))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8, -1])
def test_values(groups, unbiased):
    layer = built(lambda: EvoNormS0(groups, unbiased=unbiased), (None, 3, 5, 8))
    gamma, beta, v = (numpy(getattr(layer, name).value) for name in ("gamma", "beta", "v"))
    x = (normal(4, 3, 5, 8) * 2 + 1).astype("float64")
    number = 8 if groups == -1 else groups
    grouped = x.reshape(4, 3, 5, number, 8 // number)
    stddev = np.sqrt(grouped.var((1, 2, 4), ddof=int(unbiased), keepdims=True) + 1e-5)
    stddev = np.broadcast_to(stddev, grouped.shape).reshape(x.shape)
    expected = gamma * x / (1 + np.exp(-v * x)) / stddev + beta
    np.testing.assert_allclose(numpy(layer(*tensors(x.astype("float32")))), expected, rtol=1e-5, atol=1e-5)


def test_without_nonlinearity_it_is_scale_and_offset():
    layer, x = built(lambda: EvoNormS0(3, nonlinearity=False), (None, 3, 5, 8)), normal(4, 3, 5, 8)
    expected = numpy(layer.gamma.value) * x + numpy(layer.beta.value)
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-6)
    assert layer.v is None


def test_bad_groups():
    with pytest.raises(ValueError, match="`groups` must be a positive integer, or -1.*Received: groups=0"):
        EvoNormS0(0)
    with pytest.raises(ValueError, match="`groups` must be a divisor of the number of channels, 8.*Received: groups=3"):
        EvoNormS0(3).build((None, 4, 4, 8))


def test_a_config_of_the_first_version_means_unbiased_variances():
    config = EvoNormS0().get_config()
    assert config.pop("unbiased") is False
    assert EvoNormS0.from_config(config).unbiased
    assert not EvoNormS0.from_config(EvoNormS0().get_config()).unbiased
