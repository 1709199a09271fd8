"""The models that every export is tried on: small, with random norm parameters, and each with a reason to go wrong."""

import dataclasses
import logging
from collections.abc import Callable

import keras
import numpy as np
import pytest
from keras import layers
from layers.samples import normal, randomize

import keras_proxynorm as kp
from keras_proxynorm.export import onnx, saved_model

ACTIVATIONS = ("relu", "silu", "gelu", "hard_silu", "relu6", "celu", None)


@dataclasses.dataclass
class Case:
    """A model, the shapes of its inputs by name, and how it makes named outputs from named inputs."""

    model: keras.Model
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[keras.Model, dict], dict]
    arguments: dict = dataclasses.field(default_factory=dict)

    def inputs(self, batch_size):
        return {
            name: normal(batch_size, *shape, seed=i) + i for i, (name, shape) in enumerate(sorted(self.shapes.items()))
        }

    def check(self, run, batch_size):
        """Compares what `run` makes of the named inputs with what the model does."""
        inputs = self.inputs(batch_size)
        expected, received = self.call(self.model, inputs), run(inputs)
        assert set(received) == set(expected)
        for name, output in expected.items():
            output = keras.ops.convert_to_numpy(output)
            assert output.std() > 0.01
            np.testing.assert_allclose(received[name], output, rtol=1e-5, atol=1e-5, err_msg=name)


def conv_net(activation="relu", size=8):
    image = keras.Input((size, size, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(image)
    x = y = kp.GroupNormProxy(groups=4, activation=activation)(x)
    y = layers.Conv2D(8, 3, padding="same", use_bias=False)(y)
    y = kp.GroupNormProxy(groups=4, activation=None, center=False)(y)
    x = kp.LayerNormProxy(activation=activation)(layers.Add()([x, y]))
    return randomize(keras.Model(image, layers.Dense(5, name="logits")(layers.GlobalAveragePooling2D()(x))))


def image_case(model, **arguments):
    return Case(model, {"image": (8, 8, 3)}, lambda model, x: {"logits": model(x["image"])}, arguments)


def sequential():
    model = keras.Sequential(
        [keras.Input((8, 8, 3), name="image"), layers.Conv2D(8, 3), kp.LayerNormProxy(), layers.Dense(5, name="logits")]
    )
    return image_case(randomize(model))


def channels_first():
    image = keras.Input((8, 6, 5), name="image")
    x = layers.Flatten(data_format="channels_last")(kp.GroupNormProxy(groups=4, axis=1)(image))
    model = randomize(keras.Model(image, layers.Dense(5, name="logits")(x)))
    return dataclasses.replace(image_case(model), shapes={"image": (8, 6, 5)})


def two_towers():
    # Alphabetical order is not the order of the model, in the inputs and in the outputs.
    wide, narrow = keras.Input((4, 6, 8), name="wide"), keras.Input((3, 8), name="narrow")
    x, y = kp.GroupNormProxy(groups=2)(wide), kp.LayerNormProxy(activation="silu")(narrow)
    both = layers.Add()([layers.GlobalAveragePooling2D()(x), layers.GlobalAveragePooling1D()(y)])
    return wide, narrow, layers.Dense(3, name="z")(both), layers.Dense(2, name="a")(both)


def lists():
    wide, narrow, z, a = two_towers()
    return Case(
        randomize(keras.Model([wide, narrow], [z, a])),
        {"wide": (4, 6, 8), "narrow": (3, 8)},
        lambda model, x: dict(zip(("z", "a"), model([x["wide"], x["narrow"]]), strict=True)),
    )


def dicts():
    wide, narrow, z, a = two_towers()
    model = randomize(keras.Model({"wide": wide, "narrow": narrow}, {"first": z, "second": a}))
    return Case(model, {"wide": (4, 6, 8), "narrow": (3, 8)}, lambda model, x: model(x))


def repeated_output():
    image = keras.Input((8, 8, 3), name="image")
    x = kp.LayerNormProxy(name="features")(image)
    return Case(
        randomize(keras.Model(image, [x, x])),
        {"image": (8, 8, 3)},
        lambda model, x: dict(zip(("features", "features_1"), model(x["image"]), strict=True)),
    )


def called_by_keyword():
    image = keras.Input((8, 8, 3), name="image")
    x = layers.BatchNormalization()(inputs=layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs=image))
    x = kp.GroupNormProxy(4, activation="silu")(inputs=x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(inputs=x)
    gate = layers.Conv2D(8, 1, activation="sigmoid")(inputs=gate)
    y = layers.Conv2D(4, 1)(inputs=layers.Multiply()(inputs=[x, gate]))
    logits = layers.Dense(5, name="logits")(inputs=layers.GlobalAveragePooling2D()(inputs=y))
    return image_case(randomize(keras.Model(image, logits)))


def open_sizes():
    return image_case(conv_net(size=None), input_shape=(8, 8, 3))


def open_sizes_of_two():
    wide, narrow = keras.Input((None, None, 8), name="wide"), keras.Input((None, 8), name="narrow")
    outputs = [kp.GroupNormProxy(groups=2, name="z")(wide), kp.LayerNormProxy(name="a")(narrow)]
    shapes = {"wide": (4, 6, 8), "narrow": (3, 8)}
    return Case(
        randomize(keras.Model([wide, narrow], outputs)),
        shapes,
        lambda model, x: dict(zip(("z", "a"), model([x["wide"], x["narrow"]]), strict=True)),
        {"input_shape": shapes},
    )


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = kp.GroupNormProxy(groups=4, activation="silu")
        self.dense = layers.Dense(5)

    def call(self, image):
        return {"logits": self.dense(self.norm(image))}


def subclassed():
    model = Subclassed()
    model(np.zeros((2, 8, 8, 16), "float32"))
    return Case(
        randomize(model),
        {"image": (6, 6, 16)},
        lambda model, x: model(x["image"]),
        {"input_shape": (6, 6, 16)},
    )


CASES = {
    **{f"conv_net_{name}": lambda name=name: image_case(conv_net(name)) for name in ACTIVATIONS},
    **{
        make.__name__: make
        for make in (
            sequential,
            channels_first,
            lists,
            dicts,
            repeated_output,
            called_by_keyword,
            open_sizes,
            open_sizes_of_two,
            subclassed,
        )
    },
}


@pytest.fixture(autouse=True)
def unverified(request, monkeypatch):
    """Keeps exports from starting a process of seconds each: tests compare for themselves, and some mark `verified`."""
    if request.node.get_closest_marker("verified") is None:
        for module in (saved_model, onnx):
            monkeypatch.setattr(module, "verify_served", lambda *arguments, **options: None)
        monkeypatch.setattr(onnx, "fitting_runtimes", lambda *arguments: None)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.fixture
def small():
    """A case for tests that need just any."""
    return sequential()


@pytest.fixture
def files(tmp_path):
    """Lists what is in the test's directory, hidden and temporary files too."""
    return lambda: sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))


@pytest.fixture
def notes():
    """What the libraries under the exports have logged, with all of them asked to speak up."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in ("absl", "tensorflow", "tf2onnx", None)]
    listening = [logger for logger in loggers if logger.name != "tf2onnx"]
    before = [(logger.level, list(logger.filters), logger.propagate) for logger in loggers]
    for logger in listening:
        logger.addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.INFO)
    yield records
    for logger in listening:
        logger.removeHandler(handler)
    for logger, (level, filters, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        assert (logger.filters, logger.propagate) == (filters, propagate)
