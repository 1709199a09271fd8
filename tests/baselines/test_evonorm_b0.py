"""EvoNorm-B0 against NumPy."""

import numpy as np
from backends import numpy, tensors
from baselines.samples import built, normal

from keras_proxynorm.baselines import EvoNormB0


def test_values_and_moving_average():
    layer = built(lambda: EvoNormB0(unbiased=True, momentum=0.75), (None, 3, 5, 8))
    gamma, beta, v, variance = (
        numpy(getattr(layer, name).value).astype("float64") for name in ("gamma", "beta", "v", "moving_variance")
    )
    x = (normal(4, 3, 5, 8) * 2 + 0.5).astype("float64")

    def reference(variance):
        of_example = v * x + np.sqrt(x.var((1, 2), ddof=1, keepdims=True) + 1e-5)
        larger = np.maximum(np.sqrt(variance + 1e-5), of_example)
        assert 0.2 < np.mean(larger == of_example) < 0.8
        return gamma * x / larger + beta

    y = numpy(layer(*tensors(x.astype("float32")), training=True))
    np.testing.assert_allclose(y, reference(x.var((0, 1, 2))), rtol=1e-5, atol=1e-5)
    variance = 0.75 * variance + 0.25 * x.var((0, 1, 2))
    np.testing.assert_allclose(numpy(layer.moving_variance.value), variance, rtol=1e-5)
    np.testing.assert_allclose(numpy(layer(*tensors(x.astype("float32")))), reference(variance), rtol=1e-5, atol=1e-5)


def test_without_nonlinearity_it_is_scale_and_offset():
    layer, x = built(lambda: EvoNormB0(nonlinearity=False), (None, 3, 5, 8)), normal(4, 3, 5, 8)
    expected = numpy(layer.gamma.value) * x + numpy(layer.beta.value)
    for training in (True, False):
        np.testing.assert_allclose(numpy(layer(*tensors(x), training=training)), expected, rtol=1e-6)


def test_a_config_of_the_first_version_means_unbiased_variances():
    config = EvoNormB0().get_config()
    assert config.pop("unbiased") is False
    assert EvoNormB0.from_config(config).unbiased
    assert not EvoNormB0.from_config(EvoNormB0().get_config()).unbiased
