"""The normalizations of other papers, exported to SavedModel and ONNX; those that can be folded are."""

import keras
import numpy as np
import pytest
from backends import numpy, tensorflow_only
from baselines.samples import BASELINES, convolution, normal, randomize

from keras_proxynorm import baselines as bl
from keras_proxynorm.export import export_onnx, export_saved_model, fold

pytestmark = tensorflow_only

FOLDED = {
    "ghost": lambda: bl.GhostBatchNormalization(4, name="norm"),
    "ghost_hybrid": lambda: bl.GhostBatchNormalization(4, 2, name="norm"),
    "batch_group": lambda: bl.BatchGroupNormalization(2, name="norm"),
    "variance": lambda: bl.VarianceNormalization(center=False, name="norm"),
}


def make_model(make):
    layers = [keras.layers.Conv2D(8, 3, use_bias=False, name="conv"), make(), keras.layers.ReLU()]
    model = keras.Sequential([keras.Input((6, 6, 8)), *layers, keras.layers.GlobalAveragePooling2D()])
    model.add(keras.layers.Dense(3))
    randomize(model.get_layer("norm"))
    return model


@pytest.mark.parametrize("name", FOLDED)
def test_a_scale_and_an_offset_go_into_the_convolution(name):
    model, x = make_model(FOLDED[name]), normal(3, 6, 6, 8)
    folded, report = fold(model, return_report=True)
    assert isinstance(folded.get_layer("norm"), keras.layers.Identity)
    assert list(report.folded.values()) == [f"{type(model.get_layer('norm')).__name__} into the preceding layer"]
    np.testing.assert_allclose(numpy(folded(x)), numpy(model(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, kind", [("cross_iteration", "linear"), ("weight_standardization", "silu")])
def test_a_contained_layer_takes_everything_in(name, kind):
    model, x = make_model(lambda: BASELINES[name](name="norm")), normal(3, 6, 6, 8)
    folded, report = fold(model, return_report=True)
    layer = folded.get_layer("norm")
    assert type(layer) is keras.layers.Conv2D and layer.use_bias and layer.activation.__name__ == kind
    assert report.folded == {"norm": f"{type(model.get_layer('norm')).__name__} into the linear layer inside of it"}
    np.testing.assert_allclose(numpy(folded(x)), numpy(model(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bl.WeightNormalization(convolution(), name="norm"),
        lambda: bl.ConvolutionalNormalization(convolution(), name="norm"),
        lambda: bl.GhostBatchNormalization(inference_example_weight=0.1, name="norm"),
        lambda: bl.BatchGroupNormalization(2, use_moving_statistics=False, name="norm"),
        lambda: bl.BatchGroupNormalization(16, name="norm"),
        lambda: bl.InstanceEnhancementBatchNormalization(name="norm"),
    ],
)
def test_what_looks_at_its_inputs_stays(make):
    model, x = make_model(make), normal(3, 6, 6, 8)
    folded = fold(model)
    assert type(folded.get_layer("norm")) is type(model.get_layer("norm"))
    np.testing.assert_allclose(numpy(folded(x)), numpy(model(x)), rtol=1e-5, atol=1e-5)


# The exports verify themselves, against the model, in processes of their own.
@pytest.mark.slow
@pytest.mark.verified
@pytest.mark.parametrize("name", BASELINES)
def test_files(name, tmp_path):
    model = make_model(lambda: BASELINES[name](name="norm"))
    assert export_onnx(model, tmp_path / "model.onnx", batch_size=None).exists()
    assert export_saved_model(model, tmp_path / "model").exists()
