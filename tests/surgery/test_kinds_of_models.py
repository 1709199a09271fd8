"""replace_normalization on models of every kind: nested, shared, cut, of a class, from a file."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import numpy, tensorflow_only
from surgery.stand_ins import assert_same_outputs, conv_bn, exact, image, nested, outputs, randomize, small_model

import keras_proxynorm as kp

pytestmark = pytest.mark.filterwarnings("error::UserWarning:keras_proxynorm", "error:.*not reached")

BatchNormalization = keras.layers.BatchNormalization


def siamese():
    backbone = small_model()
    left, right = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    return keras.Model([left, right], keras.layers.Subtract()([backbone(left), backbone(right)]))


def sequential():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(8, 3),
            BatchNormalization(),
            keras.layers.ReLU(),
            keras.Sequential([keras.layers.Conv2D(8, 3), BatchNormalization(), keras.layers.LeakyReLU(0.1)]),
            small_model_from(8),
        ],
        name="chain",
    )


def small_model_from(channels):
    inputs = keras.Input((None, None, channels))
    return keras.Model(inputs, keras.layers.ReLU()(conv_bn(inputs, "inner")), name="inner_model")


def dictionaries():
    a, b = keras.Input((8, 8, 3), name="a"), keras.Input((8, 8, 3), name="b")
    x = keras.layers.ReLU(name="shared")(conv_bn(keras.layers.Concatenate()([a, b]), "conv"))
    return keras.Model({"a": a, "b": b}, {"mean": keras.layers.GlobalAveragePooling2D(name="mean")(x), "map": x})


def shared_layers():
    conv, bn, relu = keras.layers.Conv2D(3, 3, padding="same"), BatchNormalization(), keras.layers.ReLU()
    inputs = keras.Input((8, 8, 3))
    x = relu(bn(conv(inputs)))
    return keras.Model(inputs, relu(bn(conv(x))))


def cut():
    base = small_model()
    return keras.Model(base.get_layer("conv").output, base.output)


def video():
    inputs = keras.Input((4, 8, 8, 3))
    x = keras.layers.TimeDistributed(small_model(), name="frames")(inputs)
    return keras.Model(inputs, keras.layers.GRU(4)(x))


def masked():
    inputs = keras.Input((8,), dtype="int32")
    x = keras.layers.Embedding(10, 8, mask_zero=True)(inputs)
    x = keras.layers.ReLU()(BatchNormalization()(x))
    return keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(x))


def functions():
    inputs = keras.Input((8, 8, 3))
    x = keras.ops.relu(conv_bn(inputs, "a"))
    x = keras.activations.silu(conv_bn(x, "b"))
    x = keras.activations.gelu(conv_bn(x, "c"))
    return keras.Model(inputs, keras.activations.relu(conv_bn(x, "d"), max_value=3.0))


@keras.saving.register_keras_serializable("keras_proxynorm_tests")
class Ours(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


def of_a_class():
    model = small_model()
    return Ours(model.input, model.output, name="ours")


MODELS = [nested, siamese, sequential, dictionaries, shared_layers, cut, video, masked, functions, of_a_class]


def data_for(model):
    def for_input(tensor):
        shape = (2, *(size or 8 for size in tensor.shape[1:]))
        if "int" in str(tensor.dtype):
            return np.random.default_rng(0).integers(0, 4, shape).astype("int32")
        return image(*shape) / 100

    return keras.tree.map_structure(for_input, model.inputs[0] if isinstance(model, keras.Sequential) else model.input)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_models_of_every_kind(make):
    model = make()
    x = data_for(model)
    before = [numpy(weight) for weight in randomize(model).weights]
    replaced, report = exact(model, x)
    assert report.count("left alone") == 0 and report.count("fused") + report.count("split") >= 1
    assert type(replaced) is type(model) and replaced.name == model.name
    for structure in ("inputs", "outputs") if isinstance(model, keras.Sequential) else ("input", "output"):
        shapes = [keras.tree.map_structure(lambda x: x.shape, getattr(m, structure)) for m in (model, replaced)]
        assert shapes[0] == shapes[1]
    assert [layer.name for layer in replaced.layers if isinstance(layer, keras.layers.InputLayer)] == [
        layer.name for layer in model.layers if isinstance(layer, keras.layers.InputLayer)
    ]
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)
    proxied, report = kp.replace_normalization(model, return_report=True)
    assert report.parameters_after == proxied.count_params() and report.parameters_before == model.count_params()
    assert not any(isinstance(layer, BatchNormalization) for layer in proxied._flatten_layers())
    assert all(np.isfinite(output).all() for output in outputs(proxied, x))
    with pytest.warns(UserWarning, match="No normalization layer"):
        again = kp.replace_normalization(proxied)
    assert_same_outputs(proxied, again, x)


@tensorflow_only
@pytest.mark.parametrize("make", [nested, sequential, functions, of_a_class], ids=lambda make: make.__name__)
def test_the_result_is_a_model_like_any_other(make, tmp_path):
    model = make()
    replaced = kp.replace_normalization(model, to="layer_norm_proxy")
    replaced.summary(print_fn=lambda line: None)
    assert replaced.layers[2].name in keras.utils.model_to_dot(replaced, expand_nested=True).to_string()
    x = data_for(model)
    features = keras.Model(replaced.inputs[0], replaced.layers[2].output)
    assert np.isfinite(outputs(features, x)[0]).all()
    clone = keras.models.clone_model(replaced)
    clone.set_weights(replaced.get_weights())
    assert_same_outputs(replaced, clone, x)
    replaced.compile("adam", "mse")
    replaced.fit(x, np.zeros_like(outputs(replaced, x)[0]), verbose=0)
    replaced.save(tmp_path / "model.keras")
    assert_same_outputs(replaced, keras.saving.load_model(tmp_path / "model.keras"), x)


def test_a_model_from_a_file_in_a_fresh_process(tmp_path):
    model = small_model()
    model.save(tmp_path / "source.keras")
    replaced = kp.replace_normalization(keras.saving.load_model(tmp_path / "source.keras"))
    replaced.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", image(2, 8, 8, 3))
    code = """
import sys, keras, numpy as np, keras_proxynorm
folder = sys.argv[1]
np.save(folder + "/y.npy", keras.saving.load_model(folder + "/model.keras").predict(np.load(folder + "/x.npy")))
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), outputs(replaced, image(2, 8, 8, 3))[0], rtol=1e-5)


def test_channels_first():
    inputs = keras.Input((3, None, None))
    x = keras.layers.Conv2D(8, 3, data_format="channels_first", name="conv")(inputs)
    x = BatchNormalization(axis=1)(x)
    model = keras.Model(inputs, keras.layers.ReLU(name="act")(x))
    layer = kp.replace_normalization(model).get_layer("act")
    assert (layer.axis, layer.groups, layer.gamma.shape) == (1, 2, (8,))
