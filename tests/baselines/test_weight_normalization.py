"""Weight normalization: values against NumPy, filters of unit length, standardized signals, gradients, zero filters."""

import keras
import numpy as np
import pytest
from backends import check_gradients, float64_allowed, gradients, needs_float64, numpy, tensors
from baselines.samples import normal, randomize
from keras import layers

from keras_proxynorm.baselines import WeightNormalization

CASES = {
    "dense": (lambda **kw: layers.Dense(6, **kw), (5, 4)),
    "conv1d": (lambda **kw: layers.Conv1D(6, 3, dilation_rate=2, padding="causal", **kw), (2, 7, 4)),
    "conv2d": (lambda **kw: layers.Conv2D(6, (3, 2), strides=2, padding="same", **kw), (2, 5, 6, 4)),
    "grouped": (lambda **kw: layers.Conv2D(6, 3, groups=2, **kw), (2, 5, 6, 4)),
    "conv3d": (lambda **kw: layers.Conv3D(6, 2, **kw), (2, 3, 4, 3, 4)),
    "depthwise": (lambda **kw: layers.DepthwiseConv2D(3, depth_multiplier=2, **kw), (2, 5, 6, 4)),
}
every_case = pytest.mark.parametrize("case", CASES)


def make(case="conv2d", dtype=None, **kwargs):
    """A built layer, with a kernel, a scale and an offset that are random."""
    linear, shape = CASES[case]
    layer = WeightNormalization(linear(use_bias=False, dtype=dtype), dtype=dtype, **kwargs)
    layer.build(shape)
    return randomize(layer)


def normalized(layer, kernel):
    """The kernel that the linear layer gets, by the formula, one filter after the other."""
    filters, channels = np.asarray(kernel, "float64"), layer.channels
    found = np.empty_like(filters).reshape(-1, channels)
    gamma = np.ones(channels) if layer.gamma is None else numpy(layer.gamma)
    for c, values in enumerate(filters.reshape(-1, channels).T):
        found[:, c] = gamma[c] * values / (np.sqrt(sum(values**2)) + layer.kernel_epsilon)
    return found.reshape(filters.shape)


def linear_with(layer, kernel, x):
    """What a layer like the one inside makes of the inputs with this kernel."""
    linear = type(layer.layer).from_config(layer.layer.get_config())
    linear.build(x.shape)
    linear.set_weights([kernel])
    return numpy(linear(*tensors(x)))


@every_case
def test_values(case):
    layer, x = make(case), normal(*CASES[case][1])
    outputs = linear_with(layer, normalized(layer, numpy(layer.layer.kernel)), x)
    expected = 1.712858 * (np.maximum(outputs + numpy(layer.beta), 0) - 0.398942)
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "activation, mean, std",
    [
        (None, 0, 1),
        ("relu", 1 / np.sqrt(2 * np.pi), np.sqrt((np.pi - 1) / (2 * np.pi))),
        ("tanh", 0, np.sqrt(0.394294)),
    ],
)
def test_activations(activation, mean, std):
    layer, x = make(activation=activation, center=False, scale=False, kernel_epsilon=0.01), normal(*CASES["conv2d"][1])
    assert layer.gamma is None and layer.beta is None
    outputs = linear_with(layer, normalized(layer, numpy(layer.layer.kernel)), x)
    expected = (numpy(keras.activations.get(activation)(outputs)) - mean) / std
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-4, atol=1e-5)


def test_filters_have_unit_length():
    layer = WeightNormalization(layers.Dense(7, use_bias=False), activation=None, center=False, scale=False)
    layer.build((None, 50))
    layer.layer.kernel.assign(3 * normal(50, 7) + 2)
    # What the layer makes of unit vectors is the matrix that it multiplies with.
    filters = numpy(layer(*tensors(np.eye(50, dtype="float32"))))
    np.testing.assert_allclose(np.sqrt(np.sum(filters**2, 0)), 1, rtol=1e-5)


def test_signals_stay_standardized():
    """Mean and variance of what enters the next layer are 0 and 1, for Gaussian inputs."""
    layer = WeightNormalization(layers.Dense(64, use_bias=False))
    z = numpy(layer(*tensors(normal(4096, 256))))
    np.testing.assert_allclose(z.mean(), 0, atol=0.01)
    np.testing.assert_allclose(z.var(0).mean(), 1, rtol=0.03)


@every_case
def test_the_length_of_a_filter_does_not_matter(case):
    layer, x = make(case, kernel_epsilon=0), normal(*CASES[case][1])
    expected = numpy(layer(*tensors(x)))
    kernel = numpy(layer.layer.kernel)
    scaled = (kernel.reshape(-1, layer.channels) * np.linspace(0.5, 3, layer.channels)).reshape(kernel.shape)
    layer.layer.kernel.assign(scaled)
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-4, atol=1e-5)
    layer.layer.kernel.assign(-scaled)
    assert np.abs(numpy(layer(*tensors(x))) - expected).max() > 0.1


@needs_float64
@pytest.mark.parametrize("case", ["dense", "conv2d", "depthwise"])
def test_gradients(case):
    x = normal(*CASES[case][1], dtype="float64")
    with float64_allowed():
        layer = make(case, dtype="float64", activation="silu")
        values = [numpy(v.value) for v in layer.trainable_variables]
        (weights,) = tensors(normal(*layer.compute_output_shape(x.shape)), dtype="float64")

    def scalar(x, *values):
        outputs, _ = layer.stateless_call(list(values), [], x)
        return keras.ops.sum(weights * keras.ops.square(outputs) + outputs)

    check_gradients(scalar, x, *values, step=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", ["dense", "depthwise"])
@pytest.mark.parametrize("kernel_epsilon", [1e-5, 0.1])
def test_filters_of_zeros_stay_0(case, kernel_epsilon):
    layer, x = make(case, kernel_epsilon=kernel_epsilon), normal(*CASES[case][1])
    kernel = numpy(layer.layer.kernel).reshape(-1, layer.channels).copy()
    kernel[:, 0] = 0
    layer.layer.kernel.assign(kernel.reshape(layer.layer.kernel.shape))
    values = [v.value for v in layer.trainable_variables]

    def loss(x, *values):
        outputs, _ = layer.stateless_call(list(values), [], x)
        return keras.ops.sum(keras.ops.square(outputs + 1))

    outputs = numpy(layer(*tensors(x)))[..., 0]
    expected = 1.712858 * (max(numpy(layer.beta)[0], 0) - 0.398942)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=2e-6)
    for gradient in gradients(loss, *tensors(x, *map(numpy, values))):
        assert np.all(np.isfinite(numpy(gradient)))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: WeightNormalization(layers.Dense(3)), "`layer`.*use_bias=False"),
        (lambda: WeightNormalization(layers.Dense(3, "relu", use_bias=False)), "`layer`.*without activation"),
        (lambda: WeightNormalization(layers.Conv2DTranspose(3, 2, use_bias=False)), "`layer`.*Conv2DTranspose"),
        (lambda: WeightNormalization(3), "`layer`.*Received: layer=3"),
        (lambda: WeightNormalization(layers.Dense(3, use_bias=False), -1e-5), "`kernel_epsilon`.*-1e-05"),
        (lambda: WeightNormalization(layers.Dense(3, use_bias=False), "a"), "`kernel_epsilon`.*'a'"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()
