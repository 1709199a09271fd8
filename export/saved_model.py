"""Export to a TensorFlow SavedModel in the layout of TensorFlow Serving."""

import os
from pathlib import Path

import keras

from keras_proxynorm.export.atomic import local_path
from keras_proxynorm.export.atomic import replacing
from keras_proxynorm.export.logs import quiet
from keras_proxynorm.export.serving_function import serving_function

__all__ = ["export_saved_model"]


def export_saved_model(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    batch_size: int | None = 1,
    input_shape=None,
    version: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model as a TensorFlow SavedModel, ``directory/<version>/``, for TensorFlow Serving or TensorFlow alone.

    The SavedModel has the forward pass only, as the signature ``serving_default``. Its inputs have the names of the
    model's inputs, its outputs the keys of the model's output or the names of the layers that they come from. It loads
    with ``tf.saved_model.load``, without Keras and without this package. It appears under its name only when it is
    complete.

    Args:
        model: A built Keras model, on the TensorFlow backend.
        directory: The model's directory. It is made if it is missing.
        batch_size: Integer, the batch size that the SavedModel takes, or None for any. Defaults to 1.
        input_shape: Tuple of integers, the sizes of the input without the batch; a list of tuples in the order of
            ``model.inputs``, or a dict of tuples by name, for several inputs. Needed where the model leaves sizes
            open, and for subclassed models, whose `call` it describes: a tuple for a tensor, a list for a list, a dict
            for a dict.
        version: Positive integer, the name of the directory to write. Defaults to the one after the highest that is
            there, beginning with 1.
        overwrite: If True, replace `version` if it exists. Defaults to False.

    Returns:
        The `pathlib.Path` of the version's directory.

    Raises:
        RuntimeError: If the Keras backend is not TensorFlow.
        ValueError: If the model is not built, if its shapes are not known and not given, or if an argument is not of
            the form above.
        FileExistsError: If `version` exists and `overwrite` is False.

    Example:

    >>> import tempfile
    >>> import keras, keras_proxynorm, tensorflow as tf
    >>> from keras_proxynorm.export import export_saved_model
    >>> image = keras.Input((8, 8, 1), name="image")
    >>> features = keras_proxynorm.LayerNormProxy(name="features")(keras.layers.Conv2D(16, 3)(image))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = export_saved_model(keras.Model(image, features), directory)
    ...     path.name
    ...     serve = tf.saved_model.load(path).signatures["serving_default"]
    ...     serve(image=tf.zeros((1, 8, 8, 1)))["features"].shape
    '1'
    TensorShape([1, 6, 6, 16])
    """
    directory = local_path("directory", directory)
    if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version < 1):
        raise ValueError(f"Argument `version` must be a positive integer or None. Received: version={version!r}")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"Argument `directory` must not be a file. Received: directory={str(directory)!r}")
    serve, signature = serving_function(model, batch_size, input_shape)
    target = directory / str(_next_version(directory) if version is None else version)
    with replacing(target, overwrite) as temporary, quiet("absl", "tensorflow"):
        archive = keras.export.ExportArchive()
        archive.track(model)
        # Named as by model.export, for keras.layers.TFSMLayer; Keras adds "serving_default" as another name.
        archive.add_endpoint("serve", serve, signature)
        archive.write_out(str(temporary), verbose=False)
    return target


def _next_version(directory):
    if not directory.exists():
        return 1
    return 1 + max((int(child.name) for child in directory.iterdir() if child.name.isdecimal()), default=0)
