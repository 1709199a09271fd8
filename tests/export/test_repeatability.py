"""Models that draw random numbers or keep state at inference are refused before anything is written."""

from typing import ClassVar

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from keras import layers, ops
from layers.samples import normal

import keras_proxynorm as kp
from keras_proxynorm.export import export_onnx, export_saved_model, verify
from keras_proxynorm.export.repeatability import check_repeatable
from keras_proxynorm.export.serving_function import serving_function

pytestmark = tensorflow_only


def always(cls):
    """A layer that does at inference what it should do in training alone."""

    class Always(cls):
        def call(self, inputs, training=None):
            return super().call(inputs, training=True)

    return keras.saving.register_keras_serializable("test_repeatability", name=f"Always{cls.__name__}")(Always)


class Function(layers.Layer):
    """A layer of one function, which copies share."""

    functions: ClassVar[dict] = {}

    def __init__(self, key, **kwargs):
        super().__init__(**kwargs)
        self.key = key

    def call(self, inputs):
        return self.functions[self.key](inputs)

    def get_config(self):
        return {**super().get_config(), "key": self.key}


def function(function):
    Function.functions[function.__name__] = function
    return lambda: Function(function.__name__, name="odd")


@function
def sampling(x):
    return x + keras.random.normal(ops.shape(x))


@function
def shuffled(x):
    return keras.random.shuffle(x, axis=-1)


@function
def drawn_by_tensorflow(x):
    import tensorflow as tf

    return x + tf.random.normal(tf.shape(x))


@function
def drawn_by_a_generator(x):
    import tensorflow as tf

    return x + tf.random.get_global_generator().normal(tf.shape(x))


@function
def drawn_in_a_branch(x):
    return ops.cond(ops.sum(x) > 0, lambda: x + keras.random.uniform((16,)), lambda: x)


@function
def drawn_for_categories(x):
    return x + ops.cast(keras.random.categorical(x, 16), "float32")


@function
def fixed_noise(x):
    return x + keras.random.normal((16,), seed=3)


@function
def unused_noise(x):
    keras.random.normal((16,))
    return x


RANDOM = {
    "dropout": lambda: always(layers.Dropout)(0.5, name="odd"),
    "gaussian_noise": lambda: always(layers.GaussianNoise)(0.5, name="odd"),
    "gaussian_dropout": lambda: always(layers.GaussianDropout)(0.5, name="odd"),
    "alpha_dropout": lambda: always(layers.AlphaDropout)(0.5, name="odd"),
    "sampling": sampling,
    "shuffled": shuffled,
    "drawn_by_tensorflow": drawn_by_tensorflow,
    "drawn_by_a_generator": drawn_by_a_generator,
    "drawn_in_a_branch": drawn_in_a_branch,
    "drawn_for_categories": drawn_for_categories,
}


def network(layer):
    image = keras.Input((8, 8, 3), name="image")
    x = kp.GroupNormProxy(4)(layers.Conv2D(16, 3)(image))
    return keras.Model(image, layers.Dense(3, name="logits")(layer(layers.GlobalAveragePooling2D()(x))))


class Subclassed(keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.inner = network(layer)

    def call(self, image):
        return self.inner(image)


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers(name):
    model = network(RANDOM[name]())
    with pytest.raises(ValueError, match=r"`model` must .*layer 'odd' \(\w+\) draws random numbers at inference"):
        check_repeatable(model, *serving_function(model, 1, None))


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("export", [export_onnx, export_saved_model])
@pytest.mark.parametrize("make", [network, Subclassed])
def test_exports_refuse_them(make, export, fold, tmp_path, files):
    model = make(sampling())
    model(normal(1, 8, 8, 3))
    arguments = {"input_shape": (8, 8, 3)} if make is Subclassed else {}
    if make is Subclassed and fold:
        pytest.skip("cannot be folded, with a warning")
    with pytest.raises(
        ValueError, match=r"layer 'odd' \(Function\) draws random numbers at inference.*Received: model="
    ):
        export(model, tmp_path / "new" / "model", fold=fold, **arguments)
    assert files() == []


def test_verify_refuses_them(tmp_path):
    pytest.importorskip("onnxruntime")
    path = export_onnx(network(unused_noise()), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="layer 'odd' .* draws random numbers"):
        verify(network(sampling()), path)


def test_state(tmp_path):
    x = keras.Input(batch_shape=(1, 5, 4))
    model = keras.Model(x, layers.LSTM(3, stateful=True, name="counting")(x))
    with pytest.raises(ValueError, match=r"layer 'counting' \(LSTM\) keeps values from one call to the next"):
        check_repeatable(model, *serving_function(model, 1, None))


@pytest.mark.parametrize(
    "make",
    [lambda: layers.Dropout(0.5), lambda: layers.GaussianNoise(0.5), fixed_noise, unused_noise],
    ids=["dropout", "gaussian_noise", "fixed_noise", "unused_noise"],
)
@pytest.mark.parametrize("fold", [True, False])
def test_what_is_the_same_at_each_call_is_exported(make, fold, tmp_path):
    check_exports(network(make()), fold, tmp_path)


# RandomHue and MixUp draw random numbers at inference, too, and return their input.
@pytest.mark.parametrize("make", [layers.RandomFlip, lambda: layers.RandomHue(0.2), layers.MixUp])
@pytest.mark.parametrize("fold", [True, False])
def test_augmentation_is_exported(make, fold, tmp_path):
    image = keras.Input((8, 8, 3), name="image")
    x = kp.GroupNormProxy(4)(layers.Conv2D(16, 3)(make()(image)))
    model = keras.Model(image, layers.Dense(3, name="logits")(layers.GlobalAveragePooling2D()(x)))
    check_exports(model, fold, tmp_path)


def check_exports(model, fold, tmp_path):
    import tensorflow as tf

    onnxruntime = pytest.importorskip("onnxruntime")
    x = normal(1, 8, 8, 3)
    expected = keras.ops.convert_to_numpy(model(x, training=False))
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "model.onnx", fold=fold))
    np.testing.assert_allclose(session.run(None, {"image": x})[0], expected, rtol=1e-5, atol=1e-5)
    loaded = tf.saved_model.load(export_saved_model(model, tmp_path / "model", fold=fold))
    for _ in range(2):
        received = loaded.signatures["serving_default"](image=tf.constant(x))["logits"]
        np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-5)
