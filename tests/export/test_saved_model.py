"""SavedModels are loaded and run, here and without Keras; versions, and nothing half-written."""

import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import tensorflow_only

from keras_proxynorm.export import export_saved_model

pytestmark = tensorflow_only


def runner(path):
    import tensorflow as tf

    model = tf.saved_model.load(path)

    def run(inputs):
        outputs = model.signatures["serving_default"](**{name: tf.constant(x) for name, x in inputs.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return run


def test_any_batch_size(case, tmp_path):
    run = runner(export_saved_model(case.model, tmp_path, batch_size=None, **case.arguments))
    for batch_size in (1, 2, 5):
        case.check(run, batch_size)


def test_one_batch_size(case, tmp_path):
    import tensorflow as tf

    path = export_saved_model(case.model, tmp_path, batch_size=3, **case.arguments)
    run = runner(path)
    case.check(run, 3)
    _, specs = tf.saved_model.load(path).signatures["serving_default"].structured_input_signature
    assert {name: tuple(spec.shape) for name, spec in specs.items()} == {
        name: (3, *shape) for name, shape in case.shapes.items()
    }
    with pytest.raises(Exception, match="shape"):
        run(case.inputs(2))


def test_batch_size_defaults_to_one(small, tmp_path):
    run = runner(export_saved_model(small.model, tmp_path))
    small.check(run, 1)
    with pytest.raises(Exception, match="shape"):
        run(small.inputs(2))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, tmp_path):
    import tensorflow as tf

    keras.config.set_dtype_policy(policy)
    image = keras.Input((4, 4, 8), name="image")
    model = keras.Model(image, keras.layers.Conv2D(3, 3, name="conv")(image))
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 8)).astype("float32")
    output = runner(export_saved_model(model, tmp_path))({"image": x})["conv"]
    np.testing.assert_array_equal(output, tf.convert_to_tensor(model(x)).numpy())


def test_without_keras(small, tmp_path):
    path = export_saved_model(small.model, tmp_path / "model", batch_size=2)
    np.savez(tmp_path / "inputs.npz", **small.inputs(2))
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('keras', 'keras_proxynorm', 'tf_keras')))\n"
        "import numpy as np, tensorflow as tf\n"
        "model = tf.saved_model.load(sys.argv[1])\n"
        "inputs = {name: tf.constant(x) for name, x in np.load(sys.argv[2]).items()}\n"
        "outputs = model.signatures['serving_default'](**inputs)\n"
        "np.savez(sys.argv[3], **{name: x.numpy() for name, x in outputs.items()})\n"
    )
    arguments = [path, tmp_path / "inputs.npz", tmp_path / "outputs.npz"]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    small.check(lambda inputs: dict(np.load(tmp_path / "outputs.npz")), 2)


def test_as_a_keras_layer(small, tmp_path):
    layer = keras.layers.TFSMLayer(export_saved_model(small.model, tmp_path, batch_size=2), call_endpoint="serve")
    small.check(lambda inputs: layer(inputs["image"]), 2)


def test_string_lookup_goes_along(tmp_path):
    import tensorflow as tf

    word = keras.Input((), dtype="string", name="word")
    model = keras.Model(word, keras.layers.StringLookup(vocabulary=["a", "b"], name="index")(word))
    serve = tf.saved_model.load(export_saved_model(model, tmp_path, batch_size=None)).signatures["serving_default"]
    np.testing.assert_array_equal(serve(word=tf.constant(["b", "c", "a"]))["index"], [2, 0, 1])


def test_versions(small, tmp_path):
    directory = tmp_path / "not" / "yet" / "there"
    assert export_saved_model(small.model, directory) == directory / "1"
    assert export_saved_model(small.model, str(directory)) == directory / "2"
    assert export_saved_model(small.model, directory, version=10) == directory / "10"
    (directory / "99a").mkdir()
    (directory / "notes.txt").touch()
    assert export_saved_model(small.model, directory, overwrite=True) == directory / "11"
    assert {path.name for path in directory.iterdir()} == {"1", "2", "10", "11", "99a", "notes.txt"}


def test_readable_by_others(small, tmp_path):
    # A server often runs as another user.
    made = tmp_path / "made"
    made.mkdir()
    assert export_saved_model(small.model, tmp_path).stat().st_mode == made.stat().st_mode


def test_overwrite(small, tmp_path):
    path = export_saved_model(small.model, tmp_path, version=7)
    with pytest.raises(FileExistsError, match="overwrite"):
        export_saved_model(small.model, tmp_path, version=7, batch_size=4)
    small.check(runner(path), 1)
    assert export_saved_model(small.model, tmp_path, version=7, batch_size=4, overwrite=True) == path
    small.check(runner(path), 4)
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


@pytest.fixture
def full_disk(monkeypatch):
    """After this is called, half a SavedModel can be written."""
    import tensorflow as tf

    def write_half(trackable, export_dir, **kwargs):
        pathlib.Path(export_dir, "variables").mkdir(parents=True)
        pathlib.Path(export_dir, "saved_model.pb").write_bytes(b"half")
        raise OSError("disk full")

    return lambda: monkeypatch.setattr(tf.saved_model, "save", write_half)


def test_failure_leaves_nothing(small, tmp_path, files, full_disk):
    full_disk()
    with pytest.raises(OSError, match="disk full"):
        export_saved_model(small.model, tmp_path / "new" / "model")
    assert files() == []


def test_failure_leaves_the_old_version(small, tmp_path, files, full_disk):
    path = export_saved_model(small.model, tmp_path, version=1)
    before = files()
    full_disk()
    with pytest.raises(OSError, match="disk full"):
        export_saved_model(small.model, tmp_path, version=1, overwrite=True)
    assert files() == before
    small.check(runner(path), 1)


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", True])
def test_bad_version(small, tmp_path, version):
    with pytest.raises(ValueError, match="`version`.*Received: version="):
        export_saved_model(small.model, tmp_path, version=version)


def test_bad_directory(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`directory`"):
        export_saved_model(small.model, tmp_path / "file")


def test_quiet(tmp_path, notes, capfd):
    # TensorFlow has something to say about the dash, and about having written assets.
    x = keras.Input((4,), name="dash-ed")
    export_saved_model(keras.Model(x, keras.layers.Dense(2)(x)), tmp_path)
    assert notes == [] and capfd.readouterr().out == ""
