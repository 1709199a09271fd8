"""Warm-up requests are read back and replayed, as TensorFlow Serving does when it loads the model."""

import functools
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from backends import tensorflow_only

import keras_proxynorm.export
from keras_proxynorm.export.warm_up import write_warm_up_requests

prediction_log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")

pytestmark = tensorflow_only

# Without requests of its own, and without a comparison with the model, which is the business of other tests.
export_saved_model = functools.partial(keras_proxynorm.export.export_saved_model, warmup=False, verify=False)


def read(path):
    """The requests in a file; records of another kind, or with more than a request, are not what the server wants."""
    requests = []
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        log = prediction_log_pb2.PredictionLog.FromString(record)
        assert log.WhichOneof("log_type") == "predict_log"
        assert not log.HasField("log_metadata") and not log.predict_log.HasField("response")
        requests.append(log.predict_log.request)
    return requests


def replay(version, request):
    model = tf.saved_model.load(version)
    signature = model.signatures[request.model_spec.signature_name]
    inputs = {name: tf.constant(tf.make_ndarray(proto)) for name, proto in request.inputs.items()}
    return {name: tensor.numpy() for name, tensor in signature(**inputs).items()}


def test_replay(case, tmp_path):
    version = export_saved_model(case.model, tmp_path, batch_size=2, **case.arguments)
    path = write_warm_up_requests(version, [case.inputs(2)])
    assert path == version / "assets.extra" / "tf_serving_warmup_requests"
    (request,) = read(path)
    assert request.model_spec.signature_name == "serving_default"
    assert not request.model_spec.name and not request.model_spec.HasField("version") and not request.output_filter
    expected = case.call(case.model, case.inputs(2))
    outputs = replay(version, request)
    assert {name: x.shape for name, x in outputs.items()} == {name: x.shape for name, x in expected.items()}
    assert all(np.isfinite(x).all() for x in outputs.values())
    case.check(lambda inputs: outputs, 2)


def test_several_batch_sizes(small, tmp_path):
    version = export_saved_model(small.model, tmp_path, batch_size=None)
    sizes = [1, 4, 2]
    requests = read(write_warm_up_requests(version, [small.inputs(size) for size in sizes]))
    assert [len(tf.make_ndarray(request.inputs["image"])) for request in requests] == sizes
    for request, size in zip(requests, sizes, strict=True):
        assert replay(version, request)["logits"].shape[0] == size


def test_strings(tmp_path):
    word = keras.Input((), dtype="string", name="word")
    model = keras.Model(word, keras.layers.StringLookup(vocabulary=["a", "b"], name="index")(word))
    version = export_saved_model(model, tmp_path)
    (request,) = read(write_warm_up_requests(version, [{"word": np.array(["b"])}]))
    np.testing.assert_array_equal(replay(version, request)["index"], [2])


def test_another_signature(small, tmp_path):
    version = export_saved_model(small.model, tmp_path)
    (request,) = read(write_warm_up_requests(version, [small.inputs(1)], signature_name="serve"))
    assert request.model_spec.signature_name == "serve"
    small.check(lambda inputs: replay(version, request), 1)


def test_as_many_as_the_server_reads(small, tmp_path):
    version = export_saved_model(small.model, tmp_path)
    requests = [small.inputs(1)] * 1000
    assert len(read(write_warm_up_requests(version, requests))) == 1000
    for wrong in ([*requests, requests[0]], []):
        with pytest.raises(ValueError, match=f"1 to 1000 dicts. Received: {len(wrong)} requests"):
            write_warm_up_requests(version, wrong, overwrite=True)


def test_overwrite(small, tmp_path, files):
    version = export_saved_model(small.model, tmp_path)
    path = write_warm_up_requests(version, [small.inputs(1)])
    before = files()
    with pytest.raises(FileExistsError, match="overwrite"):
        write_warm_up_requests(version, [small.inputs(1)] * 2)
    assert len(read(path)) == 1
    assert write_warm_up_requests(str(version), [small.inputs(1)] * 2, overwrite=True) == path
    assert len(read(path)) == 2 and files() == before


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "the inputs ['image']. Received: requests[1] with []"),
        (
            {"picture": np.zeros((1, 8, 8, 3), "float32")},
            "the inputs ['image']. Received: requests[1] with ['picture']",
        ),
        (np.zeros((1, 8, 8, 3), "float32"), "the inputs ['image']. Received: requests[1] = array("),
        ({"image": np.zeros((1, 8, 8, 3))}, "Received: requests[1]['image'] of dtype float64 and shape (1, 8, 8, 3)"),
        ({"image": np.zeros((2, 8, 8, 3), "float32")}, "float32 arrays of shape (1, 8, 8, 3) for the input 'image'"),
        (
            {"image": np.zeros((8, 8, 3), "float32")},
            "Received: requests[1]['image'] of dtype float32 and shape (8, 8, 3)",
        ),
    ],
)
def test_what_the_server_would_refuse(small, tmp_path, files, request_, message):
    version = export_saved_model(small.model, tmp_path)
    before = files()
    with pytest.raises(ValueError) as caught:
        write_warm_up_requests(version, [small.inputs(1), request_])
    assert message in str(caught.value)
    assert files() == before


def test_bad_arguments(small, tmp_path):
    version = export_saved_model(small.model, tmp_path)
    with pytest.raises(ValueError, match="`version_directory` must be the directory of a SavedModel"):
        write_warm_up_requests(tmp_path, [small.inputs(1)])
    with pytest.raises(ValueError, match=r"one of \['serve', 'serving_default'\]. Received: signature_name='predict'"):
        write_warm_up_requests(version, [small.inputs(1)], signature_name="predict")
    with pytest.raises(ValueError, match="`requests` must be a list"):
        write_warm_up_requests(version, small.inputs(1))


def test_missing_package(small, tmp_path, files, monkeypatch):
    version = export_saved_model(small.model, tmp_path)
    before = files()
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(ImportError, match="pip install tensorflow-serving-api"):
        write_warm_up_requests(version, [small.inputs(1)])
    assert files() == before


def test_protos_load_when_they_are_used():
    script = "import sys, keras_proxynorm.export.warm_up; print('tensorflow_serving' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
