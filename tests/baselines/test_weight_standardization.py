"""Weight standardization: values against NumPy, filters and signals of unit variance, gradients, zero filters."""

import keras
import numpy as np
import pytest
from backends import check_gradients, float64_allowed, gradients, needs_float64, numpy, tensors
from baselines.samples import normal, randomize
from keras import layers

from keras_proxynorm.baselines import WeightStandardization

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
    layer = WeightStandardization(linear(use_bias=False, dtype=dtype), dtype=dtype, **kwargs)
    layer.build(shape)
    return randomize(layer)


def standardized(layer, kernel, gain):
    """The kernel that the linear layer gets, by the formula, one filter after the other."""
    filters, channels = np.asarray(kernel, "float64"), layer.channels
    found = np.empty_like(filters).reshape(-1, channels)
    gamma = np.ones(channels) if layer.gamma is None else numpy(layer.gamma)
    for c, values in enumerate(filters.reshape(-1, channels).T):
        fan_in = len(values)
        mean = sum(values) / fan_in
        std = np.sqrt(sum((values - mean) ** 2) / fan_in)
        found[:, c] = gain * gamma[c] * (values - mean) / ((std + layer.kernel_epsilon) * np.sqrt(fan_in))
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
    outputs = linear_with(layer, standardized(layer, numpy(layer.layer.kernel), gain=1.712858), x)
    expected = np.maximum(outputs + numpy(layer.beta), 0)
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "activation, gain", [(None, 1.0), ("relu", np.sqrt(2 * np.pi / (np.pi - 1))), ("tanh", 1 / np.sqrt(0.394294))]
)
def test_gains(activation, gain):
    layer, x = make(activation=activation, center=False, scale=False, kernel_epsilon=0.01), normal(*CASES["conv2d"][1])
    assert layer.gamma is None and layer.beta is None
    outputs = linear_with(layer, standardized(layer, numpy(layer.layer.kernel), gain), x)
    expected = numpy(keras.activations.get(activation)(outputs))
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-4, atol=1e-5)


def effective_kernel(layer, fan_in):
    """The matrix that a layer of dense inputs multiplies with: what it makes of unit vectors."""
    return numpy(layer(*tensors(np.eye(fan_in, dtype="float32"))))


def test_filters_have_zero_mean_and_unit_variance():
    layer = WeightStandardization(layers.Dense(7, use_bias=False), activation=None, center=False, scale=False)
    layer.build((None, 50))
    layer.layer.kernel.assign(3 * normal(50, 7) + 2)
    filters = effective_kernel(layer, 50)
    np.testing.assert_allclose(filters.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(filters.var(0) * 50, 1, rtol=1e-4)


def test_signals_keep_their_variance():
    """The variance of what enters the next layer is 1, for Gaussian inputs, and without a gain it would be .34."""
    layer = WeightStandardization(layers.Dense(64, use_bias=False))
    z = numpy(layer(*tensors(normal(4096, 256))))
    np.testing.assert_allclose(z.var(0).mean(), 1, rtol=0.03)


@every_case
def test_scale_and_offset_of_a_filter_do_not_matter(case):
    layer, x = make(case, kernel_epsilon=0), normal(*CASES[case][1])
    expected = numpy(layer(*tensors(x)))
    kernel = numpy(layer.layer.kernel)
    factors = np.linspace(0.5, 3, layer.channels)
    offsets = np.linspace(-1, 1, layer.channels)
    moved = (kernel.reshape(-1, layer.channels) * factors + offsets).reshape(kernel.shape)
    layer.layer.kernel.assign(moved)
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-4, atol=1e-5)
    layer.layer.kernel.assign(-moved)
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
def test_constant_filters_are_0(case, kernel_epsilon):
    layer, x = make(case, kernel_epsilon=kernel_epsilon), normal(*CASES[case][1])
    kernel = numpy(layer.layer.kernel).reshape(-1, layer.channels).copy()
    kernel[:, 0] = 0
    kernel[:, 1] = 0.5
    layer.layer.kernel.assign(kernel.reshape(layer.layer.kernel.shape))
    values = [v.value for v in layer.trainable_variables]

    def loss(x, *values):
        outputs, _ = layer.stateless_call(list(values), [], x)
        return keras.ops.sum(keras.ops.square(outputs + 1))

    outputs = numpy(layer(*tensors(x)))
    expected = np.broadcast_to(np.maximum(numpy(layer.beta)[:2], 0), outputs[..., :2].shape)
    np.testing.assert_allclose(outputs[..., :2], expected, atol=1e-6)
    for gradient in gradients(loss, *tensors(x, *map(numpy, values))):
        assert np.all(np.isfinite(numpy(gradient)))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: WeightStandardization(layers.Dense(3)), "`layer`.*use_bias=False"),
        (lambda: WeightStandardization(layers.Dense(3, "relu", use_bias=False)), "`layer`.*without activation"),
        (lambda: WeightStandardization(layers.Conv2DTranspose(3, 2, use_bias=False)), "`layer`.*Conv2DTranspose"),
        (lambda: WeightStandardization(3), "`layer`.*Received: layer=3"),
        (lambda: WeightStandardization(layers.Dense(3, use_bias=False), -1e-5), "`kernel_epsilon`.*-1e-05"),
        (lambda: WeightStandardization(layers.Dense(3, use_bias=False), "a"), "`kernel_epsilon`.*'a'"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()
