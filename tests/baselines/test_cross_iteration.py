"""Cross-iteration batch normalization against the formulas of the paper, in NumPy, with raw moments and lists."""

import itertools
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import BACKEND, MODES, compiled, float64_allowed, gradients, numpy, tensorflow_only, tensors
from keras import layers

from keras_proxynorm.baselines import CrossIterationBatchNormalization

CASES = {
    "dense": (lambda **kw: layers.Dense(4, **kw), (6, 5)),
    "dense_of_sequences": (lambda **kw: layers.Dense(4, **kw), (3, 7, 5)),
    "conv1d_causal": (lambda **kw: layers.Conv1D(4, 3, padding="causal", dilation_rate=2, **kw), (3, 9, 2)),
    "conv2d": (lambda **kw: layers.Conv2D(4, (3, 2), **kw), (3, 6, 7, 3)),
    "conv2d_strided": (lambda **kw: layers.Conv2D(4, 3, strides=2, padding="same", **kw), (3, 7, 6, 3)),
    "conv2d_projection": (lambda **kw: layers.Conv2D(4, 1, strides=2, padding="same", **kw), (3, 5, 6, 3)),
    "conv2d_grouped": (
        lambda **kw: layers.Conv2D(6, 3, groups=2, padding="same", dilation_rate=(2, 1), **kw),
        (2, 6, 5, 4),
    ),
    "conv3d": (lambda **kw: layers.Conv3D(2, 2, strides=(1, 2, 1), padding="same", **kw), (2, 3, 4, 3, 2)),
    "depthwise": (
        lambda **kw: layers.DepthwiseConv2D(3, depth_multiplier=2, strides=2, padding="same", **kw),
        (3, 6, 7, 3),
    ),
    "depthwise1d": (lambda **kw: layers.DepthwiseConv1D(3, dilation_rate=2, **kw), (3, 9, 2)),
}
every_case = pytest.mark.parametrize("case", CASES)


def make(case="conv2d", dtype=None, **kwargs):
    """A built layer, with scale and offset that are not 1 and 0."""
    linear, shape = CASES[case]
    layer = CrossIterationBatchNormalization(linear(use_bias=False, dtype=dtype), dtype=dtype, **kwargs)
    layer.build(shape)
    channels = layer.gamma.shape[0]
    layer.gamma.assign(np.linspace(0.5, 1.5, channels))
    layer.beta.assign(np.linspace(-1, 1, channels))
    return layer


def batches(case="conv2d", count=5, seed=0):
    """Batches that differ in mean and variance."""
    rng = np.random.default_rng(seed)
    return [rng.normal(rng.normal(), rng.uniform(0.5, 2), CASES[case][1]).astype("float32") for _ in range(count)]


def kernels_of(layer, count=5, seed=1, size=0.1):
    """Kernels as a few steps of an optimizer leave them."""
    rng, kernel = np.random.default_rng(seed), numpy(layer.layer.kernel).astype("float64")
    return [kernel := kernel + size * rng.standard_normal(kernel.shape) for _ in range(count)]


def run(layer, inputs, kernels):
    """Outputs of some training calls."""
    outputs = []
    for x, kernel in zip(inputs, kernels, strict=True):
        layer.layer.kernel.assign(kernel)
        outputs.append(numpy(layer(*tensors(x), training=True)))
    return outputs


def patches(layer, x):
    """What each position of the output sees: ``(positions, fan_in, groups)``, copied one number after the other."""
    x, linear = np.asarray(x, "float64"), layer.layer
    size = getattr(linear, "kernel_size", ())
    strides, rates = getattr(linear, "strides", ()), getattr(linear, "dilation_rate", ())
    padding = getattr(linear, "padding", "valid")
    output = linear.compute_output_shape(x.shape)[1 : 1 + len(size)] if size else ()
    for axis in range(len(size)):
        reach = (size[axis] - 1) * rates[axis]
        total = max((output[axis] - 1) * strides[axis] + reach + 1 - x.shape[1 + axis], 0)
        before = {"valid": 0, "same": total // 2, "causal": reach}[padding]
        after = 0 if padding == "causal" else total - before
        widths = [(0, 0)] * x.ndim
        widths[1 + axis] = (before, after)
        x = np.pad(x, widths) if padding != "valid" else x
    if not size:
        found = x.reshape(-1, 1, x.shape[-1])
    else:
        found = []
        for n, *position in itertools.product(range(len(x)), *map(range, output)):
            taps = []
            for tap in itertools.product(*map(range, size)):
                places = (p * s + t * r for p, s, t, r in zip(position, strides, tap, rates, strict=True))
                taps.append(x[(n, *places)])
            found.append(taps)
        found = np.array(found)
    groups = x.shape[-1] if layer.is_depthwise else getattr(linear, "groups", 1)
    found = found.reshape(len(found), -1, groups, x.shape[-1] // groups)
    return np.moveaxis(found, 3, 2).reshape(len(found), -1, groups)


class Reference:
    """Equations 2 to 12 of the paper, with the options of the authors' code."""

    def __init__(self, layer):
        self.layer, self.history = layer, []

    def normalize(self, x, kernel, kernel_of_history=None, gamma=None, beta=None, remember=False):
        p, layer = patches(self.layer, x), self.layer
        channels = layer.gamma.shape[0]
        w = np.asarray(kernel, "float64").reshape(p.shape[1], p.shape[2], -1)
        present = w if kernel_of_history is None else np.asarray(kernel_of_history, "float64").reshape(w.shape)
        y = np.einsum("pfg,fgo->pgo", p, w)
        items = [(y.mean(0), (y**2).mean(0))]
        for mu, nu, dmu, dnu, old in self.history[-(layer.window - 1) :] if layer.window > 1 else ():
            change = layer.compensation * (present - old)
            items.append((mu + np.sum(dmu * change, 0), nu + np.sum(dnu * change, 0)))
        mus, nus = (np.array(values) for values in zip(*items, strict=True))
        used = np.ones_like(mus)
        if layer.invalid == "drop":
            used = (nus - mus**2 >= 0).astype("float64")
        mu_bar = np.sum(used * mus, 0) / np.sum(used, 0)
        nu_bar = np.sum(used * np.maximum(nus, mus**2), 0) / np.sum(used, 0)
        z = (y - mu_bar) / np.sqrt(nu_bar - mu_bar**2 + layer.epsilon)
        if remember:
            dmu = np.repeat(p.mean(0)[:, :, None], w.shape[2], 2)
            dnu = 2 * np.einsum("pgo,pfg->fgo", y, p) / len(p)
            self.history.append((*items[0], dmu, dnu, w))
        gamma, beta = (
            numpy(weight) if value is None else value for value, weight in ((gamma, layer.gamma), (beta, layer.beta))
        )
        shape = layer.compute_output_shape(np.shape(x))
        return (z.reshape(-1, channels) * gamma + beta).reshape(shape)

    def run(self, inputs, kernels):
        return [self.normalize(x, kernel, remember=True) for x, kernel in zip(inputs, kernels, strict=True)]


def assert_close(found, expected, tolerance=3e-5):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f"call {i}")


@every_case
@pytest.mark.parametrize("window", [2, 4])
def test_values(case, window):
    layer, inputs = make(case, window=window), batches(case)
    kernels = kernels_of(layer)
    expected = Reference(layer).run(inputs, kernels)
    assert_close(run(layer, inputs, kernels), expected)
    assert int(numpy(layer.iterations)) == len(inputs)


@pytest.mark.parametrize("arguments", [{"compensation": 0.5}, {"compensation": False}, {"epsilon": 0.1}])
def test_options(arguments):
    layer, inputs = make(**arguments), batches()
    kernels = kernels_of(layer)
    found = run(layer, inputs, kernels)
    assert_close(found, Reference(layer).run(inputs, kernels))
    plain = make()
    with pytest.raises(AssertionError):
        assert_close(found[1:], run(plain, inputs, kernels)[1:], 1e-2)


def test_naive_has_no_derivatives():
    names = {weight.name for weight in make(compensation=0).weights}
    assert "past_moments" in names and not any("derivatives" in name or "products" in name for name in names)


@pytest.mark.parametrize("invalid", ["clamp", "drop"])
def test_negative_variances(invalid):
    layer, inputs = make(invalid=invalid, window=3), batches(count=3)
    kernels = kernels_of(layer, 3)
    kernels[2][..., 0] = -kernels[1][..., 0]  # far out of the range of a Taylor polynomial
    expected = Reference(layer).run(inputs, kernels)
    found = run(layer, inputs, kernels)
    assert_close(found, expected)
    other = make(invalid={"clamp": "drop", "drop": "clamp"}[invalid], window=3)
    others = run(other, inputs, kernels)
    assert np.abs(others[2][..., 0] - found[2][..., 0]).max() > 0.01
    assert_close(others[2][..., 1:], found[2][..., 1:])


@pytest.mark.parametrize("case", ["conv2d", "depthwise", "dense"])
def test_unchanged_kernel_is_a_larger_batch(case):
    layer, inputs = make(case, window=3), batches(case)
    *_, found = run(layer, inputs, [numpy(layer.layer.kernel)] * 5)
    single = make(case, window=1)
    single.layer.kernel.assign(layer.layer.kernel)
    whole = numpy(single(*tensors(np.concatenate(inputs[2:])), training=True))
    np.testing.assert_allclose(found, whole[-len(found) :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["conv2d", "dense"])
def test_window_of_one_is_batch_normalization(case):
    layer = make(case, window=1)
    norm = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)
    norm.build(layer.compute_output_shape(CASES[case][1]))
    norm.gamma.assign(layer.gamma)
    norm.beta.assign(layer.beta)
    for x in batches(case, 3):
        y = layer.layer(*tensors(x))
        before = numpy(norm.moving_variance)
        expected = numpy(norm(y, training=True))
        np.testing.assert_allclose(numpy(layer(*tensors(x), training=True)), expected, rtol=1e-5, atol=1e-5)
        # Keras moves by the biased variance, except where TensorFlow fuses: compute the step anew.
        axes, count = tuple(range(y.ndim - 1)), np.prod(y.shape[:-1])
        norm.moving_variance.assign(0.9 * before + 0.1 * np.var(numpy(y), axes) * count / (count - 1))
    np.testing.assert_allclose(numpy(layer.moving_mean), numpy(norm.moving_mean), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numpy(layer.moving_variance), numpy(norm.moving_variance), rtol=1e-5)
    np.testing.assert_allclose(numpy(layer(*tensors(x))), numpy(norm(y)), rtol=1e-4, atol=1e-5)


def test_moving_statistics_are_those_of_single_batches():
    layer, single = make(window=4), make(window=1)
    inputs, kernels = batches(), kernels_of(layer)
    run(layer, inputs, kernels)
    run(single, inputs, kernels)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_array_equal(numpy(getattr(layer, name)), numpy(getattr(single, name)))


def test_burn_in():
    layer, single, inputs = make(window=3, burn_in=2), make(window=1), batches(count=6)
    kernels = kernels_of(layer, 6)
    found = run(layer, inputs, kernels)
    assert_close(found[:3], run(single, inputs[:3], kernels[:3]), 1e-6)
    assert_close(found[2:], Reference(layer).run(inputs[2:], kernels[2:]))


@pytest.mark.parametrize("case", ["conv2d_strided", "depthwise", "dense"])
def test_gradients(case):
    """Those of a function in which all that is remembered is constant, corrected for the kernel as it is now."""
    with float64_allowed():
        layer, inputs = make(case, dtype="float64"), batches(case)
        kernels = kernels_of(layer)
        reference = Reference(layer)
        reference.run(inputs[:-1], kernels[:-1])
        run(layer, inputs[:-1], kernels[:-1])
        x, kernel = inputs[-1].astype("float64"), kernels[-1]
        values = [x, kernel, *(numpy(weight).astype("float64") for weight in (layer.gamma, layer.beta))]
        weights = np.random.default_rng(2).standard_normal(layer.compute_output_shape(x.shape))

        def loss(x, kernel, gamma, beta):
            fixed = [weight.value for weight in layer.non_trainable_variables]
            given = {"kernel": kernel, "gamma": gamma, "beta": beta}
            trainable = [given[weight.name] for weight in layer.trainable_variables]
            outputs, _ = layer.stateless_call(trainable, fixed, x, training=True)
            return keras.ops.sum(tensors(weights, dtype="float64")[0] * outputs)

        found = [numpy(g) for g in gradients(loss, *tensors(*values, dtype="float64"))]
    for i, value in enumerate(values):
        direction = np.random.default_rng(i).standard_normal(value.shape)

        def along(t, i=i, direction=direction):
            moved = [a + t * direction if j == i else a for j, a in enumerate(values)]
            x, new, gamma, beta = moved
            return np.sum(weights * reference.normalize(x, new, kernel, gamma, beta))

        numeric = (along(1e-5) - along(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.sum(found[i] * direction), numeric, rtol=1e-6, atol=1e-7)


def test_large_offsets():
    layer, inputs = make(window=3), [x + 1000 for x in batches()]
    kernels = [kernel.astype("float32") for kernel in kernels_of(layer, size=1e-3)]
    assert_close(run(layer, inputs, kernels), Reference(layer).run(inputs, kernels), 5e-3)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    half, full, inputs = make(dtype=policy), make(), batches()
    kernels = kernels_of(full)
    expected = run(full, inputs, kernels)
    for x, kernel, y in zip(inputs, kernels, expected, strict=True):
        half.layer.kernel.assign(kernel)
        found = half(*tensors(x), training=True)
        assert keras.backend.standardize_dtype(found.dtype) == policy.removeprefix("mixed_")
        tolerance = 1e-2 if policy == "mixed_float16" else 8e-2
        np.testing.assert_allclose(numpy(keras.ops.cast(found, "float32")), y, rtol=tolerance, atol=tolerance)
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in half.weights} == {"float32", "int32"}


def run_stateless(layer, mode, inputs, kernels):
    """Outputs of some training calls that are compiled."""

    def step(trainable, non_trainable, x):
        return layer.stateless_call(trainable, non_trainable, x, training=True)

    step, state, outputs = compiled(step, mode), [weight.value for weight in layer.non_trainable_variables], []
    for x, kernel in zip(inputs, kernels, strict=True):
        layer.layer.kernel.assign(kernel)
        y, state = step([weight.value for weight in layer.trainable_variables], state, *tensors(x))
        outputs.append(numpy(y))
    return outputs


# The test of channels_first compiles a strided convolution by XLA, `test_fit` a depthwise one.
IN_XLA = ("conv2d_grouped", "dense_of_sequences")


@pytest.mark.parametrize(
    "case, mode",
    [
        pytest.param(case, mode, marks=pytest.mark.slow if mode == "xla" and case not in IN_XLA else ())
        for case in ("conv2d_strided", "conv2d_grouped", "depthwise", "dense_of_sequences")
        for mode in MODES
    ],
)
def test_compiled(case, mode):
    layer, inputs = make(case, window=3), batches(case, 4)
    kernels = kernels_of(layer, 4)
    assert_close(run_stateless(layer, mode, inputs, kernels), Reference(layer).run(inputs, kernels))


@pytest.mark.parametrize("case", ["conv2d_strided", "conv1d_causal"])
def test_channels_first_is_channels_last_transposed(case):
    last, inputs = make(case), batches(case)
    kernels = kernels_of(last)
    linear, shape = CASES[case]
    first = CrossIterationBatchNormalization(linear(use_bias=False, data_format="channels_first"))
    first.build((shape[0], shape[-1], *shape[1:-1]))
    first.gamma.assign(last.gamma)
    first.beta.assign(last.beta)
    # Compiled by XLA where there is it: TensorFlow by itself has not all of these convolutions on every CPU.
    found = run_stateless(first, MODES[-1], [np.moveaxis(x, -1, 1) for x in inputs], kernels)
    assert_close([np.moveaxis(y, 1, -1) for y in found], run(last, inputs, kernels))


@tensorflow_only
@pytest.mark.parametrize(
    "case, jit_compile",
    [
        *((case, False) for case in ("conv2d", "conv2d_strided", "conv2d_projection", "conv1d_causal")),
        ("conv2d_strided", True),
        *(pytest.param(x, True, marks=pytest.mark.slow) for x in ("conv2d", "conv2d_projection", "conv1d_causal")),
    ],
)
def test_unknown_sizes(case, jit_compile):
    import tensorflow as tf

    layer, shape = make(case), CASES[case][1]
    # Odd and even sizes are padded differently.
    sizes = [shape[:-1], tuple(n + 1 for n in shape[:-1]), tuple(n + 2 for n in shape[:-1])]
    inputs = [x for n in sizes for x in [np.random.default_rng(0).normal(1, 1, (*n, shape[-1])).astype("float32")]]
    kernels = kernels_of(layer, len(inputs))
    expected = Reference(layer).run(inputs, kernels)
    step = tf.function(
        lambda x: layer(x, training=True),
        input_signature=[tf.TensorSpec((None,) * (len(shape) - 1) + shape[-1:])],
        jit_compile=jit_compile,
    )
    for x, kernel, y in zip(inputs, kernels, expected, strict=True):
        layer.layer.kernel.assign(kernel)
        assert_close([step(x).numpy()], [y])


def make_model():
    model = keras.Sequential([keras.Input((6, 6, 3)), layers.Rescaling(2.0)])
    model.add(CrossIterationBatchNormalization(layers.Conv2D(4, 3, use_bias=False), window=4, name="norm"))
    model.add(layers.ReLU())
    model.add(CrossIterationBatchNormalization(layers.DepthwiseConv2D(2, use_bias=False), window=3, burn_in=1))
    model.add(layers.Flatten())
    model.add(layers.Dense(1))
    return model


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.skipif(BACKEND == "torch", reason="slow"))]
)
def test_fit(jit_compile):
    model, rng = make_model(), np.random.default_rng(0)
    x = rng.standard_normal((32, 6, 6, 3)).astype("float32")
    y = x[:, :2, :2, 0].mean((1, 2))[:, None]
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=jit_compile)
    losses = model.fit(x, y, batch_size=4, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.3 * losses[0]
    assert int(numpy(model.get_layer("norm").iterations)) == 64
    assert model.evaluate(x, y, verbose=0) < 0.5 * losses[0]


CONTINUE = """
import sys, numpy, keras, keras_proxynorm.baselines
model, data = keras.models.load_model(sys.argv[1]), numpy.load(sys.argv[2])
losses = [model.train_on_batch(x, y) for x, y in zip(data["x"], data["y"])]
numpy.savez(sys.argv[3], *[keras.ops.convert_to_numpy(weight) for weight in model.weights], losses=losses)
"""


def test_training_goes_on_in_another_process(tmp_path):
    model, rng = make_model(), np.random.default_rng(0)
    x, y = rng.standard_normal((6, 4, 6, 6, 3)).astype("float32"), rng.standard_normal((6, 4, 1)).astype("float32")
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=False)
    for i in range(2):
        model.train_on_batch(x[i], y[i])
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x[2:], y=y[2:])
    losses = [model.train_on_batch(x[i], y[i]) for i in range(2, 6)]
    paths = [str(tmp_path / name) for name in ("model.keras", "data.npz", "results.npz")]
    environment = {**os.environ, "KERAS_BACKEND": BACKEND}
    done = subprocess.run([sys.executable, "-c", CONTINUE, *paths], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with np.load(paths[-1]) as results:
        np.testing.assert_array_equal(results["losses"], losses)
        for i, weight in enumerate(model.weights):
            np.testing.assert_array_equal(results[f"arr_{i}"], numpy(weight), err_msg=weight.path)


def test_frozen_is_inference():
    layer, (x, *inputs) = make(), batches()
    run(layer, inputs, kernels_of(layer, 4))
    before = [numpy(weight).copy() for weight in layer.weights]
    expected = numpy(layer(*tensors(x), training=False))
    layer.trainable = False
    np.testing.assert_array_equal(numpy(layer(*tensors(x), training=True)), expected)
    for weight, value in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)


@pytest.mark.parametrize("arguments", [{}, {"center": False}, {"scale": False}])
def test_inference_linear(arguments):
    convolution = layers.Conv2D(4, 3, use_bias=False)
    layer = CrossIterationBatchNormalization(convolution, **arguments)
    (x, *inputs) = batches()
    layer.build(x.shape)
    run(layer, inputs, kernels_of(layer, 4))
    kernel, bias, activation = layer.inference_linear()
    expected = numpy(layer(*tensors(x)))
    convolution.kernel.assign(kernel)
    np.testing.assert_allclose(numpy(convolution(*tensors(x))) + bias, expected, rtol=1e-5, atol=1e-5)
    assert activation is None


def test_config_round_trip():
    layer = CrossIterationBatchNormalization(
        layers.Conv2D(4, 3, use_bias=False, padding="same"),
        window=np.int64(5),
        burn_in=7,
        momentum=0.5,
        epsilon=1e-4,
        compensation=True,
        invalid="drop",
        center=False,
        name="norm",
    )
    config = layer.get_config()
    json.dumps(config)
    layer.build((None, 6, 6, 3))
    built = layer.get_config()
    # Keras itself adds to the linear layer how it was built.
    assert built.pop("layer")["config"] == config["layer"]["config"]
    assert built == {key: value for key, value in config.items() if key != "layer"}
    copy = CrossIterationBatchNormalization.from_config(config)
    assert copy.get_config() == config
    assert (copy.window, copy.burn_in, copy.momentum, copy.compensation) == (5, 7, 0.5, 1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"window": 0}, "`window` must be a positive integer. Received: window=0"),
        ({"window": 2.5}, "`window`.*Received: window=2.5"),
        ({"burn_in": -1}, "`burn_in`.*Received: burn_in=-1"),
        ({"momentum": 1.5}, "`momentum` must be a number from 0 to 1. Received: momentum=1.5"),
        ({"momentum": "high"}, "`momentum`.*Received: momentum='high'"),
        ({"epsilon": -1e-5}, "`epsilon`.*Received: epsilon=-1e-05"),
        ({"compensation": -1}, "`compensation`.*Received: compensation=-1"),
        ({"compensation": None}, "`compensation`.*Received: compensation=None"),
        ({"invalid": "ignore"}, "`invalid`.*clamp.*drop.*Received: invalid='ignore'"),
        ({"layer": layers.Conv2D(4, 3)}, "use_bias=False"),
        ({"layer": layers.ReLU()}, "`layer`.*Received: .*<ReLU"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossIterationBatchNormalization(**{"layer": layers.Dense(4, use_bias=False), **arguments})


def test_integers_are_refused():
    with pytest.raises(ValueError, match="float dtype.*inputs.dtype=int32"):
        make()(np.ones((3, 6, 7, 3), "int32"))


MIRRORED = """
import keras, numpy, tensorflow as tf
from keras_proxynorm.baselines import CrossIterationBatchNormalization
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    layer = CrossIterationBatchNormalization(keras.layers.Conv2D(2, 3, use_bias=False), window=3)
    model = keras.Sequential([keras.Input((5, 5, 2)), layer, keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
x = numpy.random.default_rng(0).standard_normal((16, 5, 5, 2)).astype("float32")
x = x * numpy.arange(16)[:, None, None, None]
model.fit(x, numpy.zeros((16, 1)), batch_size=4, shuffle=False, verbose=0)
assert int(keras.ops.convert_to_numpy(layer.iterations)) == 4
y = keras.ops.convert_to_numpy(layer.layer(x)).astype("float64")
halves = y.reshape(8, 2, 3, 3, 2)  # a half of each batch for each replica, one after the other
(history,) = [weight for weight in layer.weights if weight.name == "past_moments"]
local = [keras.ops.convert_to_numpy(value) for value in history.value.values]
for replica in range(2):
    for age in range(2):
        part = halves[6 - 2 * age + replica]
        expected = [part.mean((0, 1, 2)), part.var((0, 1, 2))]
        numpy.testing.assert_allclose(local[replica][age], expected, rtol=1e-4, atol=1e-4)
numpy.testing.assert_allclose(keras.ops.convert_to_numpy(history), (local[0] + local[1]) / 2, rtol=1e-5)
path = __import__("sys").argv[1]
model.save(path)
loaded = keras.models.load_model(path)
for a, b in zip(loaded.get_weights(), model.get_weights()):
    numpy.testing.assert_array_equal(a, b)
"""


@tensorflow_only
@pytest.mark.slow
def test_replicas_remember_their_own(tmp_path):
    command = [sys.executable, "-c", MIRRORED, str(tmp_path / "model.keras")]
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
