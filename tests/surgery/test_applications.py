"""Every model of keras.applications: what is in it, that surgery is exact, and that the result trains and loads."""

import functools
import inspect
import json
import pathlib
import subprocess
import sys
from collections import Counter

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from surgery.stand_ins import StandIn, assert_same_outputs, image, randomize

import keras_proxynorm as kp
from keras_proxynorm.graph.activation_nodes import describe_activation
from keras_proxynorm.graph.reading import read_graphs
from keras_proxynorm.surgery.new_layers import Options, make_layer
from keras_proxynorm.surgery.planning import hidden_normalizations, plan
from keras_proxynorm.surgery.targets import Target

# For each constructor: batch normalizations whose output is read by one activation, by several equal ones, by an
# activation and something else, by no activation; and layer normalizations. Counted in Keras 3.15.
SURVEY = json.loads((pathlib.Path(__file__).parents[1] / "data" / "keras_applications.json").read_text())
TOTALS = {"sole": 2647, "same": 8, "mixed": 68, "lone": 887, "layer_norm": 187}
CONSTRUCTORS = [
    name for name, value in vars(keras.applications).items() if inspect.isfunction(value) and name[0].isupper()
]
# One of each family; the others differ in depth and width.
FAMILIES = [
    *("ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0", "InceptionResNetV2", "InceptionV3"),
    *("MobileNet", "MobileNetV2", "MobileNetV3Small", "NASNetMobile", "ResNet50", "ResNet50V2", "VGG16", "Xception"),
]
# All that surgery finds in these it finds in smaller ones, too.
LARGE = ["EfficientNetV2B0", "InceptionResNetV2", "MobileNetV2", "ResNet50V2", "Xception"]

nothing_to_replace = pytest.mark.filterwarnings("ignore:No normalization layer")


def make(name, **kwargs):
    smallest = {"Inception": 75, "Xception": 71}
    size = next((size for prefix, size in smallest.items() if name.startswith(prefix)), 32)
    return getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), **kwargs)


def survey(model):
    """The row of a model in the survey."""
    graphs, target = read_graphs(model), Target("group_norm_proxy", {})
    decisions = plan(
        graphs,
        lambda path, layer: isinstance(layer, keras.layers.BatchNormalization),
        target,
        functools.partial(make_layer, target, Options(32, 4, None, True)),
    )
    batch_norms = [x.layer for x in decisions if isinstance(x.layer, keras.layers.BatchNormalization)]
    kinds = Counter(
        {"plain": "lone", "split": "mixed", "left alone": "layer_norm"}.get(
            decision.action, "sole" if len(decision.absorbed) == 1 else "same"
        )
        for decision in decisions
    )
    assert hidden_normalizations(graphs) == {}
    assert all(layer.center for layer in batch_norms)
    return {
        **{kind: kinds[kind] for kind in TOTALS},
        "activations": sorted({describe_activation(x.activation) for x in decisions if x.activation is not None}),
        "epsilon": sorted({decision.layer.epsilon for decision in decisions}),
        "scale": sorted({layer.scale for layer in batch_norms}),
    }


def test_the_survey_knows_every_constructor():
    assert sorted(SURVEY) == sorted(CONSTRUCTORS) and len(SURVEY) == 40
    assert {kind: sum(row[kind] for row in SURVEY.values()) for kind in TOTALS} == TOTALS


@nothing_to_replace
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in FAMILIES]
)
def test_surgery_is_exact_and_the_counts_are_those_of_the_survey(name):
    _check_exactness(name)


@pytest.mark.slow
@nothing_to_replace
@pytest.mark.parametrize("name", [name for name in CONSTRUCTORS if name not in FAMILIES])
def test_surgery_is_exact_on_the_other_models(name):
    _check_exactness(name)


def _check_exactness(name):
    model = randomize(make(name, include_top=False, pooling="avg"))
    row = survey(model)
    assert row == SURVEY[name]
    weights = [keras.ops.convert_to_numpy(weight) for weight in model.weights]
    calls = [len(layer._inbound_nodes) for layer in model.layers]

    replaced, report = kp.replace_normalization(model, to=StandIn, return_report=True)
    assert (report.count("fused"), report.count("split"), report.count("plain"), report.count("left alone")) == (
        row["sole"] + row["same"],
        row["mixed"],
        row["lone"],
        row["layer_norm"],
    )
    absorbed = [name for layer in report.layers for name in layer.absorbed]
    names = {layer.name for layer in model.layers}
    assert len(absorbed) == len(set(absorbed))
    # The name of every activation is still there, on the layer that contains it; of several equal ones, that of one.
    missing = set(absorbed) - {layer.name for layer in replaced.layers}
    assert len(missing) == sum(len(layer.absorbed) - 1 for layer in report.layers if layer.absorbed)
    assert replaced.output_names == model.output_names and replaced.layers[0].name == model.layers[0].name
    assert {layer.name for layer in replaced.layers} <= names

    assert_same_outputs(model, replaced, image(1, *model.input_shape[1:]))
    for weight, before in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), before)
    assert [len(layer._inbound_nodes) for layer in model.layers] == calls


_FRESH = """
import sys
import keras, numpy as np
import keras_proxynorm
folder = sys.argv[1]
model = keras.saving.load_model(folder + "/model.keras")
data = np.load(folder + "/data.npz")
np.testing.assert_allclose(model(data["x"], training=False), data["y"], rtol=1e-5, atol=1e-7)
# A graph sums in another order, and over a map of one pixel the statistics of a few values amplify that.
np.testing.assert_allclose(model.predict(data["x"], verbose=0), data["y"], atol=0.02)
"""


@tensorflow_only
@pytest.mark.slow
@nothing_to_replace
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_the_result_trains_and_loads_in_a_fresh_process(name, tmp_path):
    source = make(name, classes=10)
    model, report = kp.replace_normalization(source, return_report=True)
    assert report.replaced == sum(SURVEY[name][kind] for kind in ("sole", "same", "mixed", "lone"))
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers)
    del source
    # Compiling a graph of hundreds of layers takes minutes, and what is traced is the same in the whole family.
    eagerly = name not in FAMILIES
    model.compile(keras.optimizers.SGD(1e-4), "sparse_categorical_crossentropy", run_eagerly=eagerly)
    x = image(2, *model.input_shape[1:])
    history = model.fit(x, np.array([1, 2]), batch_size=1, steps_per_epoch=1, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    np.savez(tmp_path / "data.npz", x=x, y=model(x, training=False))
    model.save(tmp_path / "model.keras")
    keras.utils.clear_session()
    del model
    run = subprocess.run([sys.executable, "-c", _FRESH, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
