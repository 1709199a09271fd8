"""Heights, widths and steps stay open in a file if they are asked to, and the file is right at each size."""

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from keras import layers, ops
from layers.samples import normal, randomize

import keras_proxynorm as kp
from keras_proxynorm.export import export_onnx, export_saved_model, verify
from keras_proxynorm.export.open_sizes import sizes_to_try, with_fixed_sizes
from keras_proxynorm.export.verification import artefact_inputs

pytestmark = tensorflow_only


def segmentation(upsampling):
    image = keras.Input((None, None, 3), name="image")
    x = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(image)
    x = kp.GroupNormProxy(4, activation="relu6")(x)
    x = kp.LayerNormProxy()(layers.Conv2D(8, 3, padding="same")(x))
    return randomize(keras.Model(image, layers.Conv2D(2, 1, name="mask")(upsampling(x))))


UPSAMPLING = {
    "bilinear": lambda: layers.UpSampling2D(2, interpolation="bilinear"),
    "bicubic": lambda: layers.UpSampling2D((2, 2), interpolation="bicubic"),
    "nearest": lambda: layers.UpSampling2D(2),
    "transposed": lambda: layers.Conv2DTranspose(8, 3, strides=2, padding="same"),
}


def run_saved_model(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    return lambda x: loaded.signatures["serving_default"](image=tf.constant(x))["mask"]


def run_onnx(path):
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return lambda x: session.run(["mask"], {"image": x})[0]


@pytest.mark.parametrize(
    "name, batch_size, fold",
    [
        ("bilinear", 2, True),
        ("bilinear", None, False),
        ("bicubic", None, True),
        ("nearest", None, True),
        ("transposed", None, True),
    ],
)
@pytest.mark.parametrize("export, run", [(export_saved_model, run_saved_model), (export_onnx, run_onnx)])
def test_statistics_are_right_at_each_size(name, export, run, batch_size, fold, tmp_path):
    model = segmentation(UPSAMPLING[name]())
    path = export(model, tmp_path / "model", input_shape=(None, None, 3), batch_size=batch_size, fold=fold)
    assert artefact_inputs(path) == {"image": ((batch_size, None, None, 3), "float32")}
    serve = run(path)
    for height, width in ((8, 8), (20, 12), (34, 62)):
        x = 3 + normal(2, height, width, 3)
        np.testing.assert_allclose(serve(x), model(x), rtol=1e-4, atol=1e-5)


def test_channels_first(tmp_path):
    image = keras.Input((3, None, None), name="image")
    upsampled = layers.UpSampling2D((2, 3), interpolation="bilinear", data_format="channels_first", name="mask")(image)
    model = keras.Model(image, upsampled)
    serve = run_saved_model(export_saved_model(model, tmp_path, input_shape=(3, None, None)))
    x = normal(1, 3, 6, 5)
    np.testing.assert_allclose(serve(x), model(x), atol=1e-5)


@pytest.mark.parametrize("export", [export_saved_model, export_onnx])
def test_it_is_verified_at_two_sizes(export, tmp_path):
    pytest.importorskip("onnxruntime")
    comparisons = []

    def check(*args, **kwargs):
        comparisons.extend(verify(*args, **kwargs).comparisons)

    export(segmentation(UPSAMPLING["bilinear"]()), tmp_path / "model", input_shape=(None, None, 3), verify=check)
    assert {comparison.sizes for comparison in comparisons} == {(64, 64), (96, 64)}
    assert "sizes 96x64" in "\n".join(map(str, comparisons))


def test_a_file_that_is_right_at_one_size_only_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")

    def network(scale):
        image = keras.Input((None, None, 3), name="image")
        return keras.Model(image, layers.Lambda(lambda x: x * scale(ops.shape(x)[1]), name="mask")(image))

    path = export_onnx(network(lambda height: 1.0), tmp_path / "model.onnx", input_shape=(None, None, 3))
    other = network(lambda height: ops.where(ops.equal(height, 64), 1.0, 1.1))
    with pytest.raises(ValueError, match="for (5|6) of 12 outputs.*open sizes: fix them.*\n.*sizes 96x64"):
        verify(other, path, runtimes=["onnxruntime"])


def test_sizes_that_the_model_refuses_are_left_out(tmp_path):
    image = keras.Input((None, None, 3), name="image")
    features = kp.LayerNormProxy()(layers.Conv2D(4, 100, strides=20)(image))
    model = keras.Model(image, layers.GlobalAveragePooling2D(name="mask")(features))
    path = export_saved_model(model, tmp_path, input_shape=(None, None, 3))
    assert {comparison.sizes for comparison in verify(model, path).comparisons} == {(224, 224), (256, 224)}
    assert (path / "assets.extra" / "tf_serving_warmup_requests").exists()


def test_without_a_size_to_warm_up_with(tmp_path):
    image = keras.Input((None, None, 3), name="image")
    model = keras.Model(image, layers.Conv2D(4, 300, strides=20)(image))
    with pytest.warns(UserWarning, match="no warm-up request.*write_warm_up_requests"):
        path = export_saved_model(model, tmp_path, input_shape=(None, None, 3))
    assert not (path / "assets.extra").exists()


def test_steps(tmp_path):
    pytest.importorskip("onnxruntime")
    ids = keras.Input((None,), dtype="int32", name="ids")
    model = keras.Model(ids, layers.Dense(3)(kp.LayerNormProxy(activation="gelu")(layers.Embedding(300, 8)(ids))))
    path = export_onnx(model, tmp_path / "model.onnx", input_shape=(None,))
    assert artefact_inputs(path) == {"ids": ((1, None), "int32")}
    assert {comparison.sizes for comparison in verify(model, path).comparisons} == {(64,), (96,)}


@keras.saving.register_keras_serializable("test_open_sizes")
class NeedsSizes(layers.Layer):
    def call(self, inputs):
        return inputs / inputs.shape[1] if inputs.shape[1] > 4 else inputs

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape)


@pytest.mark.parametrize("export", [export_saved_model, export_onnx])
def test_a_layer_that_needs_sizes(export, tmp_path, files):
    image = keras.Input((None, None, 3), name="image")
    model = keras.Model(image, NeedsSizes()(image))
    with pytest.raises(ValueError, match=r"`input_shape` must fix all sizes.*image: \(None, None, 3\).*NeedsSizes"):
        export(model, tmp_path / "model", input_shape=(None, None, 3))
    assert files() == []
    export(model, tmp_path / "model", input_shape=(8, 8, 3))


def test_an_error_of_a_layer_is_not_about_sizes(tmp_path):
    image = keras.Input((8, 8, 3), name="image")

    @keras.saving.register_keras_serializable("test_open_sizes")
    class Failing(layers.Layer):
        def call(self, inputs):
            raise RuntimeError("of the user")

        def compute_output_spec(self, inputs):
            return keras.KerasTensor(inputs.shape)

    with pytest.raises(RuntimeError, match="of the user"):
        export_saved_model(keras.Model(image, Failing()(image)), tmp_path)


def test_sizes_to_try():
    def sizes(*shapes):
        return list(sizes_to_try(shapes))

    assert sizes((1, 8, 8, 3)) == [()] == sizes((None, 4))
    assert sizes((1, None, None, 3))[:2] == sizes((1, 8, None, 3), (1, None))[:2] == [(64, 64), (96, 64)]
    assert sizes((None, None, 8))[:2] == [(64,), (96,)]
    assert sizes((1, *[None] * 5))[0] == (64,) * 5
    assert with_fixed_sizes((None, 8, None, 3), 5, (96, 64)) == (5, 8, 64, 3)
