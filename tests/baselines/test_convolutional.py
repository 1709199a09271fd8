"""Convolutional normalization against NumPy's Fourier transforms, and its unit gain at every frequency."""

import keras
import numpy as np
import pytest
from backends import BACKEND, check_gradients, float64_allowed, needs_float64, numpy, tensors
from baselines.samples import normal, randomize

from keras_proxynorm.baselines import ConvolutionalNormalization
from keras_proxynorm.baselines.frequencies import filter_frequencies, kernel_power


def built(shape, convolution, **kwargs):
    layer = ConvolutionalNormalization(convolution, **kwargs)
    layer.build(shape)
    return randomize(layer)


def kernel_of(layer):
    return numpy(layer.layer.kernel).astype("float64")


def full_convolution(x, kernel):
    """All positions that the kernel touches, one product at a time."""
    n, h, w, channels = x.shape
    kh, kw, per_group, filters = kernel.shape
    groups = channels // per_group
    padded = np.pad(x, [(0, 0), (kh - 1, kh - 1), (kw - 1, kw - 1), (0, 0)])
    u = np.zeros((n, h + kh - 1, w + kw - 1, filters))
    for i in range(kh):
        for j in range(kw):
            part = padded[:, i : i + h + kh - 1, j : j + w + kw - 1]
            for c in range(filters):
                group = c // (filters // groups)
                inputs = part[..., group * per_group : (group + 1) * per_group]
                u[..., c] += inputs @ kernel[i, j, :, c]
    return u


def inverse_gain(kernel, sizes):
    spectrum = np.fft.rfft2(np.moveaxis(kernel, (0, 1), (-2, -1)), s=sizes)
    return np.sum(np.abs(spectrum) ** 2, axis=0) ** -0.5


def filtered(x, kernel):
    u = np.moveaxis(full_convolution(x.astype("float64"), kernel), -1, 1)
    v = np.fft.irfft2(np.fft.rfft2(u) * inverse_gain(kernel, u.shape[-2:]), s=u.shape[-2:])
    return np.moveaxis(v, 1, -1)


@pytest.mark.parametrize("size, shape", [(3, (7, 6)), ((2, 4), (5, 8)), (5, (5, 5)), ((1, 3), (4, 9))])
@pytest.mark.parametrize("groups", [1, 2])
def test_values_with_valid_padding(size, shape, groups):
    convolution = keras.layers.Conv2D(6, size, groups=groups, use_bias=False)
    layer, x = built((2, *shape, 4), convolution, scale=False), normal(2, *shape, 4)
    kh, kw = convolution.kernel_size
    expected = filtered(x, kernel_of(layer))[:, kh - 1 : shape[0], kw - 1 : shape[1]] + numpy(layer.beta.value)
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("shape", [(8, 9), (7, 6)])
def test_without_the_filter_it_is_the_convolution(size, strides, padding, shape, monkeypatch):
    monkeypatch.setattr("keras_proxynorm.baselines.convolutional.filter_frequencies", lambda x, *_: x)
    convolution = keras.layers.Conv2D(6, size, strides=strides, padding=padding, use_bias=False)
    layer, x = built((2, *shape, 4), convolution, center=False, scale=False), normal(2, *shape, 4)
    # Of filters of length 1, which is what is filtered.
    expected = numpy(convolution(*tensors(x))) / np.sqrt(np.sum(np.square(kernel_of(layer)), (0, 1, 2)))
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "valid", "causal"])
@pytest.mark.parametrize("strides", [1, 2])
def test_sequences(padding, strides, monkeypatch):
    convolution = keras.layers.Conv1D(6, 3, strides=strides, padding=padding, use_bias=False)
    layer, x = built((2, 9, 4), convolution, scale=False, center=False), normal(2, 9, 4)
    as_image = keras.layers.Conv2D(6, (1, 3), use_bias=False)
    image = built((2, 1, 9, 4), as_image, scale=False, center=False)
    as_image.kernel.assign(kernel_of(layer)[None])
    v = filtered(x[:, None], kernel_of(image))[:, 0]
    start = {"same": 1, "valid": 2, "causal": 0}[padding]  # 9 steps by 2 are padded as by 1
    count = 7 if padding == "valid" else 9
    expected = v[:, start : start + count : strides]
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 6), (8, 8)])
def test_unit_gain_at_every_frequency(shape):
    """Measured: the responses to an impulse in each input channel, cyclic since nothing is cropped."""
    convolution = keras.layers.Conv2D(6, 3, use_bias=False)
    layer = built((4, *shape, 4), convolution, scale=False, center=False)
    layer._crop = lambda outputs, _: outputs  # all that the kernel touches
    x = np.zeros((4, *shape, 4), "float32")
    x[range(4), 0, 0, range(4)] = 1  # an example for each input channel
    responses = np.fft.fft2(numpy(layer(*tensors(x))), axes=(1, 2))
    np.testing.assert_allclose(np.sum(np.abs(responses) ** 2, axis=0), 1, rtol=1e-4)
    plain = np.fft.fft2(full_convolution(x, kernel_of(layer)), axes=(1, 2))
    assert np.ptp(np.sum(np.abs(plain) ** 2, axis=0)) > 0.1


def test_a_kernel_of_one_pixel_is_divided_by_its_length():
    convolution = keras.layers.Conv2D(6, 1, strides=2, padding="same", use_bias=False)
    layer, x = built((2, 5, 5, 4), convolution, scale=False, center=False), normal(2, 5, 5, 4)
    kernel = kernel_of(layer)[0, 0]
    expected = x[:, ::2, ::2] @ (kernel / np.linalg.norm(kernel, axis=0))
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_the_size_of_the_kernel_does_not_matter(size):
    convolution = keras.layers.Conv2D(6, size, padding="same", use_bias=False)
    layer, x = built((2, 5, 5, 4), convolution), normal(2, 5, 5, 4)
    before = numpy(layer(*tensors(x)))
    convolution.kernel.assign(7 * kernel_of(layer) * np.arange(1, 7))
    np.testing.assert_allclose(numpy(layer(*tensors(x))), before, rtol=1e-4, atol=1e-5)


def test_the_depthwise_kernel_starts_as_an_identity():
    x = normal(2, 6, 6, 4)
    for size in (2, 3, 4):
        convolution = keras.layers.Conv2D(6, size, use_bias=False)
        with_kernel, without = (ConvolutionalNormalization(convolution, scale=scale) for scale in (True, False))
        np.testing.assert_allclose(numpy(with_kernel(*tensors(x))), numpy(without(*tensors(x))), atol=1e-6)
        assert with_kernel.depthwise_kernel.shape == (size, size, 6, 1) and without.depthwise_kernel is None
        assert with_kernel.gamma is None
    drawn = ConvolutionalNormalization(convolution, depthwise_initializer="he_uniform")
    drawn.build((None, 6, 6, 4))
    assert np.all(numpy(drawn.depthwise_kernel.value) != 0)


def test_the_depthwise_kernel_starts_with_the_scale():
    scales = np.arange(1.0, 7.0)
    convolution = keras.layers.Conv2D(6, 3, use_bias=False)
    layer = ConvolutionalNormalization(
        convolution, gamma_initializer=lambda shape, dtype: scales.astype(dtype).reshape(shape)
    )
    x = normal(2, 6, 6, 4)
    expected = scales * numpy(ConvolutionalNormalization(convolution)(*tensors(x)))
    np.testing.assert_allclose(numpy(layer(*tensors(x))), expected, rtol=1e-4, atol=1e-5)


# For edges, averages and curvature: of some frequencies they let nothing through.
FILTERS = {
    "sobel": [[1, 0, -1], [2, 0, -2], [1, 0, -1]],
    "box": [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
    "laplace": [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
}


@needs_float64
@pytest.mark.parametrize("name", FILTERS)
def test_rounding_is_not_amplified_where_a_filter_lets_nothing_through(name):
    x, results = normal(4, 12, 12, 1), {}
    for policy in ("float64", "float32", "mixed_float16", "mixed_bfloat16"):
        with float64_allowed():
            convolution = keras.layers.Conv2D(1, 3, padding="same", use_bias=False, dtype=policy)
            layer = ConvolutionalNormalization(convolution, dtype=policy)
            layer.build(x.shape)
            convolution.kernel.assign(0.1 * np.reshape(FILTERS[name], (3, 3, 1, 1)))
            y = layer(*tensors(x, dtype="float64" if policy == "float64" else "float32"))
            results[policy] = numpy(keras.ops.cast(y, "float32"))
    assert 1 < np.abs(results["float64"]).max() < 10
    for policy, tolerance in (("float32", 1e-4), ("mixed_float16", 0.1), ("mixed_bfloat16", 0.8)):
        np.testing.assert_allclose(results[policy], results["float64"], rtol=0, atol=tolerance)


def test_large_kernels_do_not_overflow_in_half_precision():
    layer = ConvolutionalNormalization(keras.layers.Conv2D(6, 3, use_bias=False, dtype="mixed_float16"), center=False)
    x = normal(2, 6, 6, 4)
    layer.build(x.shape)
    before = numpy(layer(*tensors(x)))
    layer.layer.kernel.assign(1e5 * kernel_of(layer))
    np.testing.assert_allclose(numpy(layer(*tensors(x))), before, rtol=1e-2, atol=1e-2)


def test_batch_normalization_at_the_end():
    convolution = keras.layers.Conv2D(6, 3, use_bias=False)
    plain, layer = (built((8, 6, 6, 4), convolution, batch_normalization=b, momentum=0.5) for b in (False, True))
    x = normal(8, 6, 6, 4)
    expected = keras.layers.BatchNormalization(epsilon=1e-5, momentum=0.5)
    expected.build(plain.compute_output_shape(x.shape))
    expected.set_weights(layer.norm.get_weights())
    for training in (True, False):
        y = numpy(layer(*tensors(x), training=training))
        np.testing.assert_allclose(y, numpy(expected(plain(*tensors(x)), training=training)), rtol=1e-4, atol=1e-5)
    without = built((8, 6, 6, 4), convolution, batch_normalization=True, center=False, scale=False)
    assert [len(norm.trainable_weights) for norm in (layer.norm, without.norm)] == [2, 0]


@pytest.mark.parametrize("momentum", [None, 0.75])
@pytest.mark.parametrize("size", [1, 3])
def test_moving_spectrum(momentum, size):
    convolution = keras.layers.Conv2D(6, size, use_bias=False)
    arguments = {"scale": False, "center": False}
    layer = built((2, 5, 6, 4), convolution, moving_spectrum=True, spectrum_momentum=momentum, **arguments)
    other = built((2, 5, 6, 4), convolution, **arguments)
    x = normal(2, 5, 6, 4)
    moving = numpy(layer.moving_inverse_gain.value).astype("float64")
    for step in range(3):
        convolution.kernel.assign(normal(size, size, 4, 6, seed=step))
        # In training it is that of the kernel.
        y = numpy(layer(*tensors(x), training=True))
        np.testing.assert_allclose(y, numpy(other(*tensors(x))), rtol=1e-4, atol=1e-5)
        # NumPy has half the frequencies of the last axis, the layer of the first.
        gain = np.moveaxis(inverse_gain(np.swapaxes(kernel_of(layer), 0, 1), (6 + size - 1, 5 + size - 1)), 0, -1)
        gain = np.swapaxes(gain, 0, 1) if size > 1 else gain[:1, :1]
        share = max(0.5 * (np.cos(np.pi * step / 40000) + 1), 0.01) if momentum is None else 0.25
        moving = share * gain + (1 - share) * moving
    np.testing.assert_allclose(numpy(layer.moving_inverse_gain.value), moving, rtol=1e-4)
    if momentum is not None:
        assert np.abs(numpy(layer(*tensors(x))) - y).max() > 1e-3
    with pytest.raises(ValueError, match="With moving_spectrum=True the inputs must have known sizes"):
        built((None, None, None, 4), keras.layers.Conv2D(6, 3, use_bias=False), moving_spectrum=True)


@needs_float64
def test_gradients_take_the_spectrum_for_a_constant(monkeypatch):
    x = normal(2, 5, 4, 3, dtype="float64")
    with float64_allowed():
        layer = built(x.shape, keras.layers.Conv2D(4, 3, use_bias=False, dtype="float64"), dtype="float64")
        (kernel,) = tensors(kernel_of(layer), dtype="float64")
        inverse_length = layer._inverse_length(kernel)
        monkeypatch.setattr(layer, "_inverse_length", lambda *_: inverse_length)
        gain = layer._inverse_gain(kernel * inverse_length, inverse_length, [7, 6], False)
        monkeypatch.setattr(layer, "_inverse_gain", lambda *_: gain)
        frozen = [numpy(v.value) for v in layer.trainable_variables]

    def scalar(x, *values):
        return keras.ops.sum(keras.ops.square(layer.stateless_call(list(values), [], x)[0]))

    check_gradients(scalar, x, *frozen, step=1e-5, rtol=1e-5)
    # With the spectrum as it is, the gradient is the same, though values change otherwise.
    from backends import gradients

    with float64_allowed():
        values = tensors(x, *frozen, dtype="float64")
        expected = [numpy(g) for g in gradients(scalar, *values)]
        monkeypatch.undo()
        for found, value in zip(gradients(scalar, *values), expected, strict=True):
            np.testing.assert_allclose(numpy(found), value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sizes", [(8,), (7,), (6, 5), (5, 8), (4, 3, 6)])
def test_fourier_transforms(sizes):
    rng = np.random.default_rng(0)
    axes = tuple(range(1, 1 + len(sizes)))
    x, kernel = rng.standard_normal((2, *sizes, 3)), rng.standard_normal((*(2 for _ in sizes), 4, 3))
    # Half the frequencies of the first axis: NumPy's last, if that is transformed first.
    order = (*axes[1:], axes[0])
    spectrum = np.fft.rfftn(kernel, s=[sizes[i - 1] for i in order], axes=[i - 1 for i in order])
    power = np.sum(np.abs(spectrum) ** 2, axis=-2)
    np.testing.assert_allclose(numpy(kernel_power(*tensors(kernel.astype("float32")), list(sizes))), power, rtol=1e-4)
    expected = np.fft.irfftn(np.fft.rfftn(x, axes=order) * power, s=[sizes[i - 1] for i in order], axes=order)
    found = filter_frequencies(*tensors(x.astype("float32"), power.astype("float32")), list(axes))
    np.testing.assert_allclose(numpy(found), expected, rtol=1e-4, atol=1e-3)


def test_large_images_lose_nothing():
    """Angles of thousands of turns."""
    x = normal(1, 1024, 2)
    (response,) = tensors(np.ones((513, 1), "float32"))
    np.testing.assert_allclose(numpy(filter_frequencies(*tensors(x), response, [1])), x, atol=1e-4)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        run = tf.function(lambda x: filter_frequencies(x, response, [1]), input_signature=[tf.TensorSpec((1, None, 2))])
        np.testing.assert_allclose(run(x), x, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kernel_epsilon": -1}, "`kernel_epsilon`.*Received: kernel_epsilon=-1"),
        ({"spectrum_momentum": 2}, "`spectrum_momentum` must be a number from 0 to 1. Received: spectrum_momentum=2"),
        ({"layer": keras.layers.Conv2D(3, 3, dilation_rate=2, use_bias=False)}, "whose kernel is dilated"),
        ({"layer": keras.layers.Dense(3, use_bias=False)}, "kind Conv1D, Conv2D.*which is a Dense"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvolutionalNormalization(**{"layer": keras.layers.Conv2D(3, 3, use_bias=False), **arguments})
