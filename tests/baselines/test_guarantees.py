"""What every baseline does alike: configs, precision, compilation, layouts, gradients, files, freezing, errors."""

import inspect
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    MODES,
    check_gradients,
    compiled,
    float64_allowed,
    gradients,
    needs_float64,
    numpy,
    tensors,
)
from baselines.samples import ALONE, BASELINES, BATCH, CONTAINING, built, convolution, normal
from keras.src.testing import TestCase

every_baseline = pytest.mark.parametrize("name", BASELINES)
SHAPE = (6, 4, 4, 8)


@every_baseline
@pytest.mark.parametrize(
    "policy",
    # Values and dtypes of half precision are in `test_half_precision`, and in the check for mixed precision here.
    ["float32", *(pytest.param(f"mixed_{dtype}", marks=pytest.mark.slow) for dtype in ("float16", "bfloat16"))],
)
def test_keras_layer_conformance(name, policy):
    keras.config.set_dtype_policy(policy)
    sample = built(BASELINES[name], SHAPE)
    arguments = {key: value for key, value in sample.get_config().items() if key not in ("name", "trainable", "dtype")}
    if name in CONTAINING:
        arguments["layer"] = convolution()
    TestCase().run_layer_test(
        type(sample),
        init_kwargs=arguments,
        input_shape=SHAPE,
        expected_output_shape=SHAPE,
        expected_output_dtype=keras.config.dtype_policy().compute_dtype,
        expected_num_trainable_weights=len(sample.trainable_weights),
        expected_num_non_trainable_weights=len(sample.non_trainable_weights),
        # A convolution drops masks, as Keras's own do.
        supports_masking=name in ALONE,
        # The default is a policy that the layers of this test have already.
        run_mixed_precision_check=policy == "float32",
    )


@every_baseline
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "eager"])
@pytest.mark.parametrize("training", [False, True])
def test_modes_agree(name, mode, training):
    """Values, gradients and new state are those of a call in eager mode."""
    (x,) = tensors(normal(*SHAPE))

    def run(layer, mode):
        def step(x):
            return layer(x, **({"training": training} if name in BATCH else {}))

        if BACKEND == "jax":
            trainable, other = (
                [v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)
            )
            kwargs = {"training": training} if name in BATCH else {}
            function = lambda x: layer.stateless_call(trainable, other, x, **kwargs)  # noqa: E731
            y, state = compiled(function, mode)(x)
            return [numpy(y), *map(numpy, state)]
        y = compiled(step, mode)(x)
        return [numpy(y), *(numpy(v.value) for v in layer.non_trainable_variables)]

    expected = run(built(BASELINES[name], SHAPE), "eager")
    for found, value in zip(run(built(BASELINES[name], SHAPE), mode), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)


@every_baseline
@pytest.mark.parametrize("training", [False, True])
def test_half_precision(name, training):
    """What half precision costs is the rounding of inputs, kernels and outputs."""
    kwargs = {"training": training} if name in BATCH else {}
    x = normal(*SHAPE)
    expected = numpy(built(BASELINES[name], SHAPE)(*tensors(x), **kwargs))
    for policy, tolerance in (("mixed_float16", 1e-2), ("mixed_bfloat16", 6e-2)):
        keras.config.set_dtype_policy(policy)
        y = built(BASELINES[name], SHAPE)(*tensors(x), **kwargs)
        assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
        np.testing.assert_allclose(numpy(keras.ops.cast(y, "float32")), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("training", [False, True])
def test_large_half_precision_inputs_stay_finite(name, training):
    kwargs = {"training": training} if name in BATCH else {}
    x = np.clip(normal(*SHAPE), -2, 2)
    (x,) = tensors((x / np.abs(x).max() * 6.5e4).astype("float16"))
    layer = built(ALONE[name], SHAPE, dtype="mixed_float16")

    def loss(x):
        # At inference the outputs themselves may be too large for float16.
        return keras.ops.mean(keras.ops.tanh(keras.ops.cast(layer(x, **kwargs), "float32") / 1e4))

    assert np.all(np.isfinite(numpy(gradients(loss, x)[0])))


@pytest.mark.parametrize("name", [name for name in ALONE if name in BATCH and name != "variance"] + ["evonorm_s0"])
def test_large_offsets(name):
    """At 1e4 float32 is known to 5e-4; what the input says comes out in full precision, where the mean is taken out."""
    x = (normal(6, 8, 8, 8) + 1e4).astype("float32")
    with float64_allowed():
        layer, precise = (built(BASELINES[name], x.shape, dtype=dtype) for dtype in ("float32", "float64"))
        kwargs = {"training": True} if name in BATCH else {}
        found = numpy(layer(*tensors(x), **kwargs))
        expected = numpy(precise(*tensors(x, dtype="float64"), **kwargs))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@every_baseline
@pytest.mark.parametrize("training", [False, True])
def test_channels_first_is_channels_last_transposed(name, training):
    kwargs = {"training": training} if name in BATCH else {}
    last, x = built(BASELINES[name], SHAPE), normal(*SHAPE)
    if name in ALONE:
        first = ALONE[name](axis=1)
    else:
        layer = keras.layers.Conv2D(8, 3, padding="same", use_bias=False, data_format="channels_first")
        first = CONTAINING[name](layer)
    first.build((SHAPE[0], 8, *SHAPE[1:3]))
    first.set_weights(last.get_weights())
    if name in CONTAINING and BACKEND == "tensorflow":
        # On a CPU TensorFlow has no convolutions of channels first, other than in XLA.
        import tensorflow as tf

        run = tf.function(lambda x: first(x, **kwargs), jit_compile=True)
    else:
        run = lambda x: first(x, **kwargs)  # noqa: E731
    y = numpy(run(*tensors(np.moveaxis(x, -1, 1).copy())))
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), numpy(last(*tensors(x), **kwargs)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "batch_group_parts"])
@pytest.mark.parametrize("training", [False, True])
def test_unknown_sizes(name, training):
    if BACKEND != "tensorflow":
        pytest.skip("other backends know all sizes when they run")
    import tensorflow as tf

    kwargs = {"training": training} if name in BATCH else {}
    layer, other = (built(BASELINES[name], (None, None, None, 8)) for _ in range(2))
    run = tf.function(lambda x: layer(x, **kwargs), input_signature=[tf.TensorSpec((None, None, None, 8))])
    for shape in ((2, 4, 4, 8), (5, 3, 6, 8), (1, 1, 1, 8)):
        x = normal(*shape)
        np.testing.assert_allclose(run(x), other(x, **kwargs), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("shape", [(6, 8), (4, 5, 8), (2, 3, 2, 4, 8)])
def test_ranks(name, shape):
    """As many positions in a row, or none, give what they give as an image."""
    if name == "batch_group_parts" and np.prod(shape[1:]) % 16:
        pytest.skip("has features that its groups do not divide")
    layer, image = built(ALONE[name], shape), built(ALONE[name], (shape[0], 1, int(np.prod(shape[1:-1])), 8))
    kwargs = {"training": True} if name in BATCH else {}
    x = normal(*shape)
    expected = numpy(image(*tensors(x.reshape(shape[0], 1, -1, 8)), **kwargs)).reshape(shape)
    np.testing.assert_allclose(numpy(layer(*tensors(x), **kwargs)), expected, rtol=1e-5, atol=1e-5)


@needs_float64
@every_baseline
@pytest.mark.parametrize("training", [False, True])
def test_gradients(name, training):
    if name == "convolutional":
        pytest.skip("its gradient leaves out what the spectrum contributes: see its own tests")
    kwargs = {"training": training} if name in BATCH else {}
    x = normal(3, 4, 4, 8, dtype="float64")
    with float64_allowed():
        make = ALONE.get(name) or (lambda **kw: CONTAINING[name](convolution(dtype="float64"), **kw))
        layer = built(make, x.shape, dtype="float64")
        values = [numpy(v.value) for v in layer.trainable_variables]
        state = [v.value for v in layer.non_trainable_variables]

    def scalar(x, *values):
        outputs, _ = layer.stateless_call(list(values), state, x, **kwargs)
        (weights,) = tensors(normal(3, 4, 4, 8, seed=1), dtype="float64")
        return keras.ops.sum(weights * keras.ops.square(outputs) + outputs)

    check_gradients(scalar, x, *values, step=1e-6, rtol=1e-5)


@every_baseline
def test_empty_and_constant_inputs(name):
    layer = built(BASELINES[name], SHAPE)
    kwargs = {"training": True} if name in BATCH else {}
    # PyTorch has no convolution of nothing, and TensorFlow one of the wrong size.
    if BACKEND != "torch" and name != "convolutional":
        assert layer(*tensors(np.zeros((0, *SHAPE[1:]), "float32")), **kwargs).shape == (0, *SHAPE[1:])

    def loss(x):
        return keras.ops.sum(keras.ops.square(layer(x, **kwargs)))

    (x,) = tensors(np.zeros(SHAPE, "float32"))
    assert np.all(np.isfinite(numpy(layer(x, **kwargs))))
    for weight in layer.weights:
        assert np.all(np.isfinite(numpy(weight.value))), weight.name
    # The last, because in JAX it leaves its tracers in the weights.
    assert np.all(np.isfinite(numpy(gradients(loss, x)[0])))


@pytest.mark.parametrize("name", BATCH)
def test_a_frozen_layer_is_inference(name):
    layer, x = built(BASELINES[name], SHAPE), normal(*SHAPE)
    before = [numpy(v.value).copy() for v in layer.variables]
    expected = numpy(layer(*tensors(x), training=False))
    assert np.abs(numpy(layer(*tensors(x), training=True)) - expected).max() > 0.05
    for variable, value in zip(layer.variables, before, strict=True):
        variable.assign(value)
    layer.trainable = False
    np.testing.assert_array_equal(numpy(layer(*tensors(x), training=True)), expected)
    for variable, value in zip(layer.variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable.value), value)


def test_all_that_depend_on_the_batch_are_listed():
    for name, make in BASELINES.items():
        layer, x = built(make, SHAPE), normal(*SHAPE)
        kwargs = {"training": True} if "training" in layer._call_signature.parameters else {}
        alone = numpy(layer(*tensors(x[:1]), **kwargs))
        differs = np.abs(numpy(built(make, SHAPE)(*tensors(x), **kwargs))[:1] - alone).max() > 1e-3
        assert bool(differs) == (name in BATCH), name


@every_baseline
def test_config_round_trip_before_and_after_build(name):
    layer = BASELINES[name](beta_regularizer="l2", name="norm", dtype="mixed_bfloat16")
    config = layer.get_config()
    json.dumps(config)
    layer.build(SHAPE)
    layer(normal(*SHAPE))
    assert _without_build(layer.get_config()) == _without_build(config)
    copy = keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(layer))))
    assert type(copy) is type(layer)
    assert _without_build(copy.get_config()) == _without_build(config)


def _without_build(config):
    """What a contained layer says about its build is added when it is built."""
    if isinstance(config, dict):
        return {key: _without_build(value) for key, value in config.items() if key != "build_config"}
    return config


def make_model(name):
    inputs = keras.Input((6, 6, 8), name="image")
    x = BASELINES[name](name="norm")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def fit(model, seed):
    model.fit(normal(12, 6, 6, 8, seed=seed), np.arange(12) % 3, batch_size=3, shuffle=False, verbose=0)


def test_training_goes_on_in_a_fresh_process(tmp_path):
    """Only `import keras_proxynorm`; after more training there, all weights are those of training on here."""
    for name in BASELINES:
        model = make_model(name)
        fit(model, 0)
        model.save(tmp_path / f"{name}.keras")
        fit(model, 1)
        np.savez(tmp_path / f"{name}.npz", *map(np.asarray, model.get_weights()))
    code = (
        "import pathlib, sys, numpy, keras, keras_proxynorm\n"
        "x = numpy.random.default_rng(1).standard_normal((12, 6, 6, 8)).astype('float32')\n"
        "paths = sorted(pathlib.Path(sys.argv[1]).glob('*.keras'))\n"
        "for path in paths:\n"
        "    model = keras.models.load_model(path)\n"
        "    model.fit(x, numpy.arange(12) % 3, batch_size=3, shuffle=False, verbose=0)\n"
        "    expected = numpy.load(path.with_suffix('.npz'))\n"
        "    for a, key in zip(model.get_weights(), expected.files, strict=True):\n"
        "        numpy.testing.assert_allclose(a, expected[key], rtol=1e-4, atol=1e-5, err_msg=path.stem)\n"
        "print(len(paths), 'equal')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": BACKEND},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{len(BASELINES)} equal"


@pytest.mark.parametrize("name", BATCH)
def test_statistics_of_the_batch_are_of_no_single_sample(name):
    assert BASELINES[name]().values_per_statistic((None, 8)) is None


BAD_VALUES = {
    "axis": [1.5],
    "momentum": [1.5],
    **{epsilon: [-1.0, float("inf"), float("nan")] for epsilon in ("epsilon", "kernel_epsilon")},
    **{flag: ["no", None, 1] for flag in ("center", "scale", "nonlinearity", "learn_epsilon")},
    **{flag: ["no", None, 1] for flag in ("use_moving_statistics", "batch_normalization", "moving_spectrum")},
}


@every_baseline
def test_bad_arguments(name):
    taken = [argument for argument in BAD_VALUES if argument in inspect.signature(type(BASELINES[name]())).parameters]
    if name == "filter_response_plain":
        taken.remove("nonlinearity")  # which its sample gives
    assert taken
    for argument in ("center", "scale", *taken):
        for value in BAD_VALUES[argument]:
            with pytest.raises(ValueError, match=f"`{argument}` must be .* Received: {argument}={value!r}"):
                BASELINES[name](**{argument: value})


@pytest.mark.parametrize("name", ALONE)
def test_bad_shapes_and_integers(name):
    with pytest.raises(ValueError, match="`axis`.*from 1 to 3.*Received: axis=4"):
        ALONE[name](axis=4).build(SHAPE)
    with pytest.raises(ValueError, match="rank 2 or more"):
        ALONE[name]().build((8,))
    with pytest.raises(ValueError, match="must have a float dtype.*int32"):
        built(ALONE[name], SHAPE)(*tensors(np.ones(SHAPE, "int32")))


@pytest.mark.parametrize("name", CONTAINING)
@pytest.mark.parametrize(
    "layer, message",
    [
        (keras.layers.Conv2D(8, 3), "`layer`.*use_bias=False.*Received.*use_bias=True"),
        (keras.layers.Conv2D(8, 3, use_bias=False, activation="relu"), "`layer`.*without activation"),
        (keras.layers.Embedding(8, 3), "`layer` must be a layer of the kind.*which is a Embedding"),
        (keras.layers.Conv2D(8, 3, use_bias=False, activity_regularizer="l2"), "`layer`.*without activity_regularizer"),
        ("conv", "`layer` must be"),
    ],
)
def test_bad_layers(name, layer, message):
    with pytest.raises(ValueError, match=message):
        CONTAINING[name](layer)


@pytest.mark.parametrize("name", [name for name in CONTAINING if name != "convolutional"])
def test_a_kernel_that_was_quantized_later(name):
    layer = CONTAINING[name](keras.layers.Dense(8, use_bias=False))
    model = keras.Sequential([keras.Input((4,)), layer])
    model.quantize("int8")
    with pytest.raises(ValueError, match="cannot work with 'dense.*whose kernel is quantized or adapted"):
        model(np.ones((2, 4), "float32"))
