"""The guarantees that every layer gives: values, batch independence, precision, layouts, gradients, errors."""

import keras
import numpy as np
import pytest
from backends import MODES, check_gradients, compiled, float64_allowed, gradients, numpy, tensors
from keras.src.testing import TestCase
from layers.samples import LAYERS, built, normal, reference

import keras_proxynorm as kp

every_layer = pytest.mark.parametrize("name", LAYERS)
every_normalization = pytest.mark.parametrize("name", [name for name in LAYERS if name != "activation"])
every_mode = pytest.mark.parametrize("mode", MODES)
# XLA compiles for long. All layers go through it in `test_values`, and these, one for each kind of statistics and of
# proxy moments, everywhere else.
IN_XLA = ("group", "instance", "group_silu", "layer_quantiles")


def every_mode_of(names, modes=MODES):
    return pytest.mark.parametrize(
        "name, mode",
        [
            pytest.param(name, mode, marks=pytest.mark.slow if mode == "xla" and name not in IN_XLA else ())
            for name in names
            for mode in modes
        ],
    )


every_layer_and_mode = every_mode_of(LAYERS)
every_normalization_and_mode = every_mode_of([name for name in LAYERS if name != "activation"])


# Instance normalization of inputs without positions is 0, and warned about: see test_group_norm_proxy.
@pytest.mark.filterwarnings("ignore:.*each value is its own mean")
@every_layer
@pytest.mark.parametrize(
    "shape, mode",
    [
        pytest.param(shape, mode, marks=pytest.mark.slow if mode != "eager" and len(shape) != 4 else ())
        for shape in [(3, 8), (2, 5, 8), (2, 4, 5, 8), (2, 3, 2, 4, 8)]
        for mode in MODES
    ],
)
def test_values(name, mode, shape):
    layer, x = built(LAYERS[name], shape), normal(*shape)
    np.testing.assert_allclose(numpy(compiled(layer, mode)(*tensors(x))), reference(layer, x), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layer_class, arguments",
    [
        (kp.GroupNormProxy, {"groups": 4}),
        (kp.GroupNormProxy, {"groups": -1, "axis": 1, "activation": "silu", "learn_proxy": False}),
        (kp.GroupNormProxy, {"groups": 2, "activation": None, "center": False}),
        (kp.LayerNormProxy, {"activation": keras.layers.ReLU(max_value=6), "proxy_regularizer": "l2"}),
        (kp.LayerNormProxy, {"proxy_moments": "quantiles", "scale": False}),
        (kp.ProxyActivation, {"activation": "gelu"}),
    ],
)
def test_keras_layer_conformance(policy, layer_class, arguments):
    keras.config.set_dtype_policy(policy)
    plain, learned = arguments.get("activation", "") is None, arguments.get("learn_proxy", True)
    affine = arguments.get("center", True) + arguments.get("scale", True)
    TestCase().run_layer_test(
        layer_class,
        init_kwargs=arguments,
        input_shape=(2, 8, 4, 8),
        expected_output_shape=(2, 8, 4, 8),
        expected_output_dtype=keras.config.dtype_policy().compute_dtype,
        expected_num_trainable_weights=affine + (not plain and learned),
        expected_num_non_trainable_weights=int(not learned),
        expected_num_losses=int("proxy_regularizer" in arguments),
        supports_masking=True,
        # The default is a policy that the layers of this test have already.
        run_mixed_precision_check=policy == "float32",
    )


@every_layer_and_mode
def test_samples_do_not_see_each_other(name, mode):
    layer, x = built(LAYERS[name], (None, 6, 5, 8)), normal(64, 6, 5, 8) * np.linspace(0.1, 9, 64)[:, None, None, None]
    run = compiled(layer, mode)
    whole = numpy(run(*tensors(x.astype("float32"))))
    for i in (0, 17, 63):
        np.testing.assert_allclose(
            numpy(run(*tensors(x[i : i + 1].astype("float32"))))[0], whole[i], atol=1e-5, rtol=1e-5
        )
    (gradient,) = gradients(lambda x: keras.ops.sum(keras.ops.square(layer(x)[17])), *tensors(x.astype("float32")))
    assert np.any(numpy(gradient)[17])
    np.testing.assert_array_equal(numpy(gradient)[np.arange(64) != 17], 0)


@every_layer
def test_training_and_inference_are_the_same(name):
    inputs = keras.Input((4, 4, 8))
    model = keras.Model(inputs, LAYERS[name]()(inputs))
    x = normal(3, 4, 4, 8)
    before = numpy(model(x, training=True))
    np.testing.assert_array_equal(before, numpy(model(x, training=False)))
    for _ in range(3):
        model(10 * x + 3, training=True)  # a running statistic would move
    np.testing.assert_array_equal(before, numpy(model(x, training=False)))


@every_normalization_and_mode
@pytest.mark.parametrize(
    "policy, dtype, largest",
    [
        ("mixed_float16", "float16", 6.5e4),
        ("mixed_bfloat16", "float32", 7e4),
        pytest.param("mixed_float16", "float32", 7e4, marks=pytest.mark.slow),
        pytest.param("mixed_bfloat16", "float16", 6.5e4, marks=pytest.mark.slow),
    ],
)
def test_half_precision_does_not_overflow(name, mode, policy, dtype, largest):
    layer = built(LAYERS[name], (2, 6, 6, 8), dtype=policy)
    x = np.clip(normal(2, 6, 6, 8), -2, 2)
    (x,) = tensors((x / np.abs(x).max() * largest).astype(dtype))
    outputs = compiled(layer, mode)(x)
    assert keras.backend.standardize_dtype(outputs.dtype) == policy.removeprefix("mixed_")
    # In float32 within, so the only error is the last rounding of the output.
    expected = reference(layer, numpy(x))
    np.testing.assert_allclose(numpy(keras.ops.cast(outputs, "float32")), expected, rtol=1e-2, atol=1e-2)

    def loss(x):
        return keras.ops.sum(keras.ops.square(keras.ops.cast(layer(x), "float32")))

    (gradient,) = compiled(lambda x: gradients(loss, x), mode)(x)
    assert np.all(np.isfinite(numpy(gradient)))


@every_normalization
def test_float64(name):
    with float64_allowed():
        layer, x = built(LAYERS[name], (2, 5, 3, 8), dtype="float64"), normal(2, 5, 3, 8, dtype="float64")
        y = numpy(layer(*tensors(x, dtype="float64")))
    assert y.dtype == "float64"
    np.testing.assert_allclose(y, reference(layer, x), atol=1e-7)


every_scale = pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 0.05])


@every_normalization_and_mode
@every_scale
def test_large_offsets(name, scale, mode):
    _check_large_offsets(name, 14, scale, mode)


@every_mode
@every_scale
def test_large_offsets_in_large_images(scale, mode):
    _check_large_offsets("group", 224, scale, mode)


def _check_large_offsets(name, size, scale, mode):
    """At 1e4 float32 is known to 5e-4. What the input says, values and all gradients, comes out in full precision."""
    x = (scale * normal(1, size, size, 8) + 1e4).astype("float32")
    (weights,) = tensors(1 + normal(1, size, size, 8, seed=1))
    layer = built(LAYERS[name], x.shape)

    def run(x):
        def loss(x, *variables):
            outputs, _ = layer.stateless_call(list(variables), [], x)
            return keras.ops.sum(weights * keras.ops.square(outputs)) / size**2

        variables = [v.value for v in layer.trainable_variables]
        return layer(x), gradients(loss, x, *variables)

    y, found = compiled(run, mode)(*tensors(x))
    np.testing.assert_allclose(numpy(y), reference(layer, x), atol=1e-4)
    # The same rounded numbers without the offset.
    _, expected = run(*tensors((x.astype("float64") - 1e4).astype("float32")))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), atol=1e-4 * np.abs(numpy(b)).max())


@every_layer
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_channels_first_is_channels_last_transposed(name, rank):
    shape = (2, 3, 4, 5)[: rank - 1]
    last, x = built(LAYERS[name], (*shape, 8)), normal(*shape, 8)
    first = LAYERS[name](axis=1)
    first.build((2, 8, *shape[1:]))
    first.set_weights(last.get_weights())
    y = numpy(first(*tensors(np.moveaxis(x, -1, 1))))
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), numpy(last(*tensors(x))), rtol=1e-5, atol=5e-6)
    middle = LAYERS[name](axis=-2)
    middle.build((*shape[:-1], 8, shape[-1]))
    middle.set_weights(last.get_weights())
    y = numpy(middle(*tensors(np.moveaxis(x, -1, -2))))
    np.testing.assert_allclose(np.moveaxis(y, -2, -1), numpy(last(*tensors(x))), rtol=1e-5, atol=5e-6)


@every_layer
@pytest.mark.parametrize("order", [1, 2])
def test_gradients(name, order):
    x = normal(2, 3, 2, 8, dtype="float64")
    with float64_allowed():
        layer = built(LAYERS[name], x.shape, dtype="float64")
        values = [numpy(v.value) for v in layer.trainable_variables]

    def scalar(x, *values):
        outputs, _ = layer.stateless_call(list(values), [], x)
        (weights,) = tensors(normal(2, 3, 2, 8, seed=1), dtype="float64")
        return keras.ops.sum(weights * keras.ops.square(outputs) + outputs)

    check_gradients(scalar, x, *values, order=order, step=1e-6, rtol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="about JAX")
@every_layer
def test_forward_mode(name):
    import jax

    with float64_allowed():
        x, direction = tensors(normal(2, 3, 2, 8), normal(2, 3, 2, 8, seed=1), dtype="float64")
        layer = built(LAYERS[name], x.shape, dtype="float64")
        _, found = jax.jvp(layer, (x,), (direction,))
        numeric = (layer(x + 1e-6 * direction) - layer(x - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(numpy(found), numpy(numeric), atol=1e-7)


@every_mode_of(LAYERS, [mode for mode in MODES if mode != "eager"])
def test_compiled_gradients_are_eager_gradients(name, mode):
    layer, x = built(LAYERS[name], (2, 4, 4, 8)), normal(2, 4, 4, 8)

    def loss(x):
        return keras.ops.sum(keras.ops.square(layer(x)) * tensors(normal(2, 4, 4, 8, seed=1))[0])

    (expected,) = gradients(loss, *tensors(x))
    (found,) = compiled(lambda x: gradients(loss, x), mode)(*tensors(x))
    np.testing.assert_allclose(numpy(found), numpy(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "group_no_affine"])
def test_gamma_of_zero(name):
    layer, x = built(LAYERS[name], (2, 4, 4, 8)), normal(2, 4, 4, 8)
    layer.gamma.assign(np.zeros(8))

    def loss(x, *values):
        return keras.ops.sum(keras.ops.square(layer.stateless_call(list(values), [], x)[0]))

    values = tensors(*(numpy(v.value) for v in layer.trainable_variables))
    for gradient in gradients(loss, *tensors(x), *values):
        assert np.all(np.isfinite(numpy(gradient)))
    np.testing.assert_allclose(numpy(layer(x)), reference(layer, x), atol=1e-5)


@every_normalization_and_mode
def test_masked_steps_do_not_enter(name, mode):
    layer, x = built(LAYERS[name], (2, 6, 8)), normal(2, 6, 8)
    mask = np.array([[True, True, False, True, True, False], [False] * 6])
    other = np.where(mask[..., None], x, 100 * normal(2, 6, 8, seed=1)).astype("float32")
    run = compiled(lambda x: layer(x, mask=tensors(mask)[0]), mode)
    y, other_y = (numpy(run(*tensors(v))) for v in (x, other))
    np.testing.assert_allclose(y[mask], other_y[mask], atol=1e-6)
    np.testing.assert_allclose(y[:1][:, mask[0]], reference(layer, x[:1][:, mask[0]]), atol=1e-5)
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(other_y))

    def loss(x):
        return keras.ops.sum(
            keras.ops.square(layer(x, mask=tensors(mask)[0])) * tensors(mask[..., None].astype("float32"))[0]
        )

    (gradient,) = gradients(loss, *tensors(other))
    assert np.all(np.isfinite(numpy(gradient)))
    np.testing.assert_array_equal(numpy(gradient)[~mask], 0)


@every_normalization
@pytest.mark.parametrize("garbage", [np.inf, np.nan, 3e3])
def test_masked_values_do_not_reach_outputs_and_gradients(name, garbage):
    keras.config.set_dtype_policy("mixed_float16")
    layer, x = built(LAYERS[name], (2, 6, 8)), normal(2, 6, 8).astype("float16")
    mask = np.array([[True, True, False, True, True, False], [False] * 6])
    x[~mask] = garbage
    (mask_tensor,) = tensors(mask)
    assert np.all(np.isfinite(numpy(layer(*tensors(x), mask=mask_tensor))))

    def loss(x, *values):
        y = layer.stateless_call(list(values), [], x, mask=mask_tensor)[0]
        return keras.ops.sum(keras.ops.square(keras.ops.cast(y, "float32")))

    for gradient in gradients(loss, *tensors(x, *(numpy(v.value) for v in layer.trainable_variables))):
        assert np.all(np.isfinite(numpy(gradient)))


@every_layer_and_mode
def test_empty_batch(name, mode):
    layer, x = built(LAYERS[name], (None, 4, 4, 8)), np.zeros((0, 4, 4, 8), "float32")
    assert compiled(layer, mode)(*tensors(x)).shape == (0, 4, 4, 8)


def test_mask_of_a_masking_layer_reaches_the_statistics():
    x = normal(2, 5, 8)
    x[:, 3:] = 0
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, kp.LayerNormProxy()(keras.layers.Masking()(inputs)))
    np.testing.assert_allclose(numpy(model(x))[:, :3], numpy(model.layers[-1](x[:, :3])), atol=1e-6)


@pytest.mark.parametrize("name", ["group", "layer", "activation"])
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"axis": 1.5}, "`axis`.*Received: axis=1.5"),
        ({"proxy_epsilon": -0.1}, "`proxy_epsilon`.*Received: proxy_epsilon=-0.1"),
        ({"proxy_epsilon": float("nan")}, "`proxy_epsilon`.*Received: proxy_epsilon=nan"),
        ({"proxy_epsilon": float("inf")}, "`proxy_epsilon`.*Received: proxy_epsilon=inf"),
        ({"center": "no"}, "`center` must be True or False. Received: center='no'"),
        ({"scale": None}, "`scale` must be True or False. Received: scale=None"),
        ({"learn_proxy": "x"}, "`learn_proxy` must be True or False. Received: learn_proxy='x'"),
        ({"proxy_moments": "sampled"}, "`proxy_moments`.*exact.*quantiles.*Received: proxy_moments='sampled'"),
        ({"num_quantiles": 0}, "`num_quantiles`.*Received: num_quantiles=0"),
        ({"activation": "rellu"}, "`activation`.*relu.*Received: activation='rellu'"),
        ({"activation": "softmax"}, "`activation`.*Received: activation='softmax'"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_bad_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        LAYERS[name](**kwargs)


@every_layer
@pytest.mark.parametrize(
    "axis, shape, message",
    [
        (-1, (8,), "rank 2 or more.*inputs.shape=\\(8,\\)"),
        (4, (2, 4, 4, 8), "`axis`.*from 1 to 3.*Received: axis=4"),
        (0, (8, 4, 4, 8), "`axis`.*Received: axis=0"),
        (-4, (8, 4, 4, 8), "`axis`.*Received: axis=-4"),
        (-1, (2, 4, 4, None), "axis=-1 of the shape .* has none"),
    ],
)
def test_bad_shapes(name, axis, shape, message):
    with pytest.raises(ValueError, match=message):
        LAYERS[name](axis=axis).build(shape)


@every_layer
def test_several_tensors_are_refused(name):
    with pytest.raises(ValueError, match="one tensor, not several"):
        LAYERS[name]()([normal(2, 4, 8), normal(2, 4, 8)])


def test_numpy_numbers_are_numbers():
    layer = kp.GroupNormProxy(np.gcd(32, 8), axis=np.int64(-1), epsilon=np.float32(1e-3), proxy_epsilon=1)
    assert type(layer.groups) is type(layer.axis) is int and type(layer.epsilon) is float
    assert kp.GroupNormProxy.from_config(layer.get_config()).get_config() == layer.get_config()


def test_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="`mask`.*mask.shape=.2, 5.*inputs.shape=.2, 6, 8"):
        built(LAYERS["group"], (2, 6, 8))(normal(2, 6, 8), mask=tensors(np.ones((2, 5), bool))[0])


@every_layer
def test_integers_are_refused(name):
    layer = built(LAYERS[name], (2, 4, 8))
    for dtype in ("int32", "uint8"):
        with pytest.raises(ValueError, match=f"float dtype.*inputs.dtype={dtype}"):
            layer(np.ones((2, 4, 8), dtype))
        with pytest.raises(ValueError, match=f"float dtype.*inputs.dtype={dtype}"):
            layer(keras.Input((4, 8), dtype=dtype))


def test_proxy_properties():
    layer = kp.LayerNormProxy()
    assert layer.proxy is None and layer.proxy_mean is None and layer.proxy_stddev is None
    layer.build((None, 4))
    layer.proxy.assign([[1, 2, 3, 4], [0, 0, 0.5, -1]])
    np.testing.assert_array_equal(numpy(layer.proxy_mean), [1, 2, 3, 4])
    np.testing.assert_array_equal(numpy(layer.proxy_stddev), [1, 1, 1.5, 0])
    plain = kp.LayerNormProxy(activation=None)
    plain.build((None, 4))
    assert plain.proxy is None and plain.proxy_stddev is None


def test_learn_proxy_false_keeps_the_proxy():
    layer = kp.LayerNormProxy(learn_proxy=False, proxy_initializer=keras.initializers.Constant(0.25))
    layer.build((None, 4))
    assert [w.name for w in layer.trainable_weights] == ["gamma", "beta"]
    assert [w.name for w in layer.non_trainable_weights] == ["proxy"]
    np.testing.assert_allclose(numpy(layer.proxy_stddev), 1.25)
