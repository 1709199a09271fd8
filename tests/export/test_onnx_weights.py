"""Large weights bypass the converter, and go into a second file."""

import os

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from keras import layers, ops
from layers.samples import normal, randomize
from onnx_files import RUNTIMES, assert_equal, chain, count, run_onnx

import keras_proxynorm as kp
from keras_proxynorm.export import export_onnx, onnx_conversion, onnx_weights

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

pytestmark = tensorflow_only


def large(seed=0):
    keras.utils.set_random_seed(seed)
    model = chain(layers.Dense(120), kp.LayerNormProxy(activation="silu"), layers.Dense(60), shape=(40,))
    return randomize(model, seed)


@pytest.fixture
def low_limits(monkeypatch):
    monkeypatch.setattr(onnx_weights, "_LARGEST_FILE", 1000)
    monkeypatch.setattr(onnx_weights, "_LARGE", 1000)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("batch_size", [1, None])
def test_large_models_are_two_files(folded, batch_size, tmp_path, low_limits, files):
    model = large()
    path = export_onnx(model, tmp_path / "model.onnx", fold=folded, batch_size=batch_size)
    (_, data) = files()
    assert data.startswith("model.onnx-") and data.endswith(".data")
    assert path.stat().st_size < 4 * (40 * 120 + 120 * 60) <= (tmp_path / data).stat().st_size
    x = normal(1, 40)
    for run in RUNTIMES.values():
        assert_equal(run(str(path), x), model(x))


@pytest.mark.verified
def test_large_models_are_verified(tmp_path, low_limits, files):
    export_onnx(large(), tmp_path / "model.onnx")
    assert len(files()) == 2


def test_large_models_are_overwritten(tmp_path, low_limits, files):
    x = normal(1, 40)
    path = export_onnx(large(), tmp_path / "model.onnx")
    before = files()
    (tmp_path / "model.onnx-notes.data").touch()
    (tmp_path / "other.onnx").touch()
    export_onnx(large(1), path, overwrite=True)
    after = files()
    assert len(after) == 4 and before[1] not in after
    assert {"model.onnx", "model.onnx-notes.data", "other.onnx"} < set(after)
    assert_equal(run_onnx(path, x), large(1)(x))


def test_small_over_large(tmp_path, monkeypatch, files):
    with monkeypatch.context() as context:
        context.setattr(onnx_weights, "_LARGEST_FILE", 1000)
        context.setattr(onnx_weights, "_LARGE", 1000)
        path = export_onnx(large(), tmp_path / "model.onnx")
    export_onnx(large(1), path, overwrite=True)
    assert files() == ["model.onnx"]
    assert_equal(run_onnx(path, x := normal(1, 40)), large(1)(x))


def fail(*arguments, **options):
    raise OSError("disk full")


@pytest.mark.parametrize("place", ["pathlib.Path.replace", "onnx.checker.check_model", "verify"])
def test_failure_leaves_the_old_pair(place, tmp_path, monkeypatch, low_limits, files):
    path = export_onnx(large(), tmp_path / "model.onnx")
    before = {name: (tmp_path / name).read_bytes() for name in files()}
    options = {"verify": fail} if place == "verify" else {}
    with monkeypatch.context() as context:
        if place != "verify":
            context.setattr(place, fail)
        with pytest.raises(OSError, match="disk full"):
            export_onnx(large(1), path, overwrite=True, **options)
    assert {name: (tmp_path / name).read_bytes() for name in files()} == before
    assert_equal(run_onnx(path, x := normal(1, 40)), large()(x))


def test_failure_of_the_last_step_leaves_the_old_pair(tmp_path, monkeypatch, low_limits, files):
    import pathlib

    path = export_onnx(large(), tmp_path / "model.onnx")
    before = files()
    replace = pathlib.Path.replace

    def fail_for_the_model(self, target):
        return fail() if pathlib.Path(target).suffix == ".onnx" else replace(self, target)

    with monkeypatch.context() as context:
        context.setattr(pathlib.Path, "replace", fail_for_the_model)
        with pytest.raises(OSError, match="disk full"):
            export_onnx(large(1), path, overwrite=True)
    assert_equal(run_onnx(path, x := normal(1, 40)), large()(x))
    assert files() == before


@pytest.mark.slow
@pytest.mark.verified
@pytest.mark.skipif(
    os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 20e9, reason="the model alone takes a quarter of that"
)
def test_more_than_two_gigabytes(tmp_path, files):
    model = chain(layers.Dense(24_000), kp.LayerNormProxy(), layers.Dense(10), shape=(24_000,))
    path = export_onnx(model, tmp_path / "model.onnx")
    assert len(files()) == 2
    assert (tmp_path / files()[1]).stat().st_size > 2**31 > 2**20 > path.stat().st_size


class ScaledKernel(layers.Dense):
    """Reads its kernel in a way that the converter wants a constant for."""

    def call(self, x):
        return ops.matmul(x, ops.tanh(self.kernel) * 2)


WITH_WEIGHTS = {
    "dense": (lambda: layers.Dense(16), (8,)),
    "dense_of_images": (lambda: layers.Dense(16), (4, 4, 8)),
    "einsum": (lambda: layers.EinsumDense("abc,cd->abd", (4, 16)), (4, 8)),
    "embedding": (lambda: layers.Embedding(8, 16), (4,)),
    "attention": (lambda: attend, (4, 16)),
    "conv_1d": (lambda: layers.Conv1D(16, 3), (8, 4)),
    "conv_2d": (lambda: layers.Conv2D(16, 3, strides=2, padding="same"), (8, 8, 4)),
    "conv_3d": (lambda: layers.Conv3D(16, 3), (4, 4, 4, 4)),
    "grouped": (lambda: layers.Conv2D(16, 3, groups=2), (8, 8, 4)),
    "depthwise": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 16)),
    "separable": (lambda: layers.SeparableConv2D(16, 3), (8, 8, 16)),
    "transposed": (lambda: layers.Conv2DTranspose(16, 3, strides=2), (4, 4, 4)),
    "gru": (lambda: layers.GRU(8), (4, 8)),
    "lstm": (lambda: layers.LSTM(8), (4, 8)),
    "scaled": (lambda: ScaledKernel(16), (8,)),
    "each_time": (lambda: layers.TimeDistributed(layers.Conv2D(16, 3)), (2, 8, 8, 4)),
}


def attend(x):
    return layers.MultiHeadAttention(2, 8)(x, x)


# tf2onnx must know their values.
NEEDED_AS_CONSTANTS = {"gru", "lstm", "scaled"}


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_large_weights_bypass_the_converter(kind, policy, tmp_path, monkeypatch):
    keras.config.set_dtype_policy(policy)
    make, shape = WITH_WEIGHTS[kind]
    x = np.ones((1, *shape), "float32") if kind == "embedding" else normal(1, *shape)
    model = randomize(chain(make(), shape=shape))
    plain = count(onnx.load(export_onnx(model, tmp_path / "plain.onnx")))
    monkeypatch.setattr(onnx_weights, "_LARGE", 200)
    monkeypatch.setattr(onnx_weights, "_LARGEST_FILE", 200)
    freeze, bypassing = onnx_conversion._freeze, {}

    def recording(*arguments):
        frozen = freeze(*arguments)
        bypassing.update(frozen[-1])
        return frozen

    monkeypatch.setattr(onnx_conversion, "_freeze", recording)
    path = export_onnx(model, tmp_path / "model.onnx")
    proto = onnx.load(path, load_external_data=False)
    assert any(tensor.external_data for tensor in proto.graph.initializer)
    assert bool(bypassing) is (kind not in NEEDED_AS_CONSTANTS)
    # The converter merges operations in no fixed order, which makes a Reshape more or less.
    assert {**count(proto), "Reshape": 0} == {**plain, "Reshape": 0}
    for run in RUNTIMES.values() if kind not in ("gru", "lstm") else [run_onnx]:
        assert_equal(run(str(path), x), model(x), 1e-5 if policy == "float32" else 1e-2)


class ConvolutionAndNorm(keras.Model):
    """Not functional, so it is not folded."""

    def __init__(self, use_bias):
        super().__init__()
        self.convolution = layers.Conv2D(16, 3, use_bias=use_bias)
        self.norm = layers.BatchNormalization()

    def call(self, x, training=False):
        return self.norm(self.convolution(x), training=training)


@pytest.mark.parametrize("use_bias", [True, False])
def test_batch_norm_of_weights_that_bypass_the_converter(use_bias, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_weights, "_LARGE", 200)
    model = ConvolutionAndNorm(use_bias)
    x = normal(1, 6, 6, 4)
    model(x)
    randomize(model)
    path = export_onnx(model, tmp_path / "model.onnx", input_shape=(6, 6, 4), fold=False)
    for run in RUNTIMES.values():
        assert_equal(run(str(path), x), model(x))


class Table(layers.Layer):
    """Large integers."""

    def build(self, shape):
        self.table = self.add_weight(shape=(40, 50), dtype="int8", trainable=False, initializer="zeros")

    def call(self, x):
        return ops.take(ops.cast(self.table, "float32"), ops.cast(x, "int32"), axis=0)


def test_large_integers_bypass_the_converter(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_weights, "_LARGE", 200)
    monkeypatch.setattr(onnx_weights, "_LARGEST_FILE", 200)
    model = chain(Table(), shape=(3,))
    model.layers[-1].table.assign(np.random.default_rng(0).integers(-100, 100, (40, 50)))
    path = export_onnx(model, tmp_path / "model.onnx", fold=False)
    weights = onnx.load(path, load_external_data=False).graph.initializer
    assert [(tensor.data_type, len(tensor.dims)) for tensor in weights if tensor.external_data]
    assert_equal(run_onnx(path, x := np.array([[3, 39, 0]], "float32")), model(x))


def test_more_than_the_converter_takes(tmp_path, monkeypatch, files):
    monkeypatch.setattr(onnx_conversion, "_LARGEST_MESSAGE", 5000)
    export_onnx(chain(layers.Dense(300), shape=(300,)), tmp_path / "model.onnx")
    with pytest.raises(
        ValueError, match="Argument `model` must have less than 1.5 GB .*export_saved_model.*Received: "
    ):
        export_onnx(chain(layers.LSTM(30), shape=(4, 30)), tmp_path / "other.onnx")
    assert files() == ["model.onnx"]
