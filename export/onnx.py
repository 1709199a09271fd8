"""Export to ONNX, for ONNX Runtime, OpenVINO and other inference engines."""

import os
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

import keras_proxynorm
from keras_proxynorm.export.atomic import check_free
from keras_proxynorm.export.atomic import local_path
from keras_proxynorm.export.atomic import replacing
from keras_proxynorm.export.inference_model import folded_copy
from keras_proxynorm.export.inference_model import inference_model
from keras_proxynorm.export.onnx_conversion import check_opset
from keras_proxynorm.export.onnx_conversion import convert
from keras_proxynorm.export.onnx_weights import data_files
from keras_proxynorm.export.onnx_weights import save
from keras_proxynorm.export.onnx_weights import store_as_float16
from keras_proxynorm.export.serving_function import serving_function
from keras_proxynorm.export.verification import fitting_runtimes
from keras_proxynorm.export.verification import verify_served

__all__ = ["export_onnx"]


def export_onnx(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    batch_size: int | None = 1,
    input_shape=None,
    opset: int | None = None,
    dynamic_batch: bool = False,
    fold: bool = True,
    verify: bool | Callable = True,
    float16_weights: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes a model as an ONNX file, for ONNX Runtime, OpenVINO and other inference engines.

    The file has the forward pass only. Its inputs have the names of the model's inputs, its outputs the keys of the
    model's output or the names of the layers that they come from, in the model's order. What depends on weights alone,
    the moments of the proxies above all, is computed here and stored as constants. A normalization is an
    InstanceNormalization and a convolution, for which these engines have fast kernels, and images are transposed at the
    input and nowhere else. The metadata of the file say what made it and what was folded. The file appears under its
    name only when it is complete, ``onnx.checker`` has accepted it, and it has been compared with the model.

    ONNX Runtime sums up the statistics of a group in float32: over a million elements they are off by 2e-4 of the
    standard deviation, and by all of it where the mean is 1e4 times as large. `verify` looks for that.

    The weights of models of more than 1.5 GB go into a second file beside it, ``<name>-<random digits>.data``. Export
    takes memory of about four times the size of the weights, the model and its folded copy among them; forty times
    that of weights that layers do not read as they are, such as those of recurrent layers and of LoRA.

    Args:
        model: A built Keras model, on the TensorFlow backend.
        path: The file to write. Its directory is made if it is missing.
        batch_size: Integer, the batch size that the file takes, or None for any. Defaults to 1.
        input_shape: Tuple of integers, the sizes of the input without the batch; a list of tuples in the order of
            ``model.inputs``, or a dict of tuples by name, for several inputs. Needed where the model leaves sizes
            open, and for subclassed models, whose `call` it describes: a tuple for a tensor, a list for a list, a dict
            for a dict.
        opset: Integer, the version of the ONNX operator set. Defaults to 17.
        dynamic_batch: If True, the file takes any batch size, as with ``batch_size=None``. Defaults to False.
        fold: If True, export the inference form of the model, see `fold`; a model that cannot be folded is exported as
            it is, with a warning. Defaults to True.
        verify: If True, run the file in a fresh process, in those of ONNX Runtime and OpenVINO that are installed, and
            compare it with the model, see `verify`. Or a function to call in its place, with the same arguments, such
            as ``functools.partial(verify, runtimes=["onnxruntime"])``. Defaults to True.
        float16_weights: If True, round the kernels to float16 and store them so, which halves the file. Computations
            are in float32, as fast as before, and the file is compared with a model that has the rounded kernels.
            Needs a model that can be folded. Defaults to False.
        overwrite: If True, replace `path` if it exists. Defaults to False.

    Returns:
        `path` as a `pathlib.Path`.

    Raises:
        RuntimeError: If the Keras backend is not TensorFlow.
        ImportError: If tf2onnx or onnx is not installed, or nothing to verify with: ``pip install onnxruntime``.
        ValueError: If the model is not built, if its shapes are not known and not given, if it has an operation without
            an ONNX form, or if an argument is not of the form above.
        VerificationError: If the file does not compute what the model computes.
        FileExistsError: If `path` exists and `overwrite` is False.

    Example:

    >>> import tempfile
    >>> import keras, keras_proxynorm, onnxruntime
    >>> from keras_proxynorm.export import export_onnx
    >>> image = keras.Input((8, 8, 1), name="image")
    >>> features = keras_proxynorm.LayerNormProxy(name="features")(keras.layers.Conv2D(16, 3)(image))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = export_onnx(keras.Model(image, features), directory + "/model.onnx")
    ...     session = onnxruntime.InferenceSession(path)
    >>> [(tensor.name, tensor.shape) for tensor in session.get_inputs()]
    [('image', [1, 8, 8, 1])]
    >>> [(tensor.name, tensor.shape) for tensor in session.get_outputs()]
    [('features', [1, 6, 6, 16])]
    """
    path = local_path("path", path)
    if path.is_dir():
        raise ValueError(f"Argument `path` must be a file, not a directory. Received: path={str(path)!r}")
    check_free(path, overwrite)
    opset = check_opset(opset)
    if dynamic_batch:
        if batch_size not in (None, 1):
            raise ValueError(
                "Argument `batch_size` must not be given with dynamic_batch=True, which means any. "
                f"Received: batch_size={batch_size!r}"
            )
        batch_size = None
    if verify is True:
        fitting_runtimes(path)
    # First of all, because it checks the arguments.
    serving_function(model, batch_size, input_shape)
    served, folded = model, "nothing"
    if float16_weights:
        served, folded = _with_float16_kernels(model, fold)
    elif fold:
        served, folded = inference_model(model, "onnx", through_gates=True)
    serve, signature = serving_function(model, batch_size, input_shape, served)
    proto, arrays = convert(serve, signature, opset, served.variables)
    if float16_weights:
        store_as_float16(proto, arrays)
    _describe(proto, folded)
    old, new = data_files(path), None
    try:
        with replacing(path, overwrite) as temporary:
            data = save(proto, arrays, temporary, path.name)
            # What checks the file needs the memory.
            del proto, arrays
            _check(temporary, opset)
            if verify is True:
                # Rounding the kernels was asked for; nothing else may differ.
                verify_served(model, served if float16_weights else model, temporary, input_shape=input_shape)
            elif verify:
                verify(model, temporary, input_shape=input_shape)
            if data is not None:
                # First, because the file refers to it. The old file refers to another.
                new = data.replace(path.parent / data.name)
    except BaseException:
        if new is not None:
            new.unlink()
        raise
    for name in old:
        (path.parent / name).unlink(missing_ok=True)
    return path


def _with_float16_kernels(model, fold):
    """The folded model with kernels that float16 can hold, and what was folded."""
    if not fold:
        raise ValueError(
            "Argument `float16_weights` needs fold=True, which makes a copy of the model that can be changed. "
            "Received: float16_weights=True, fold=False"
        )
    folded, report = folded_copy(model, "onnx", through_gates=True)
    for weight in folded.weights:
        value = keras.ops.convert_to_numpy(weight)
        if value.ndim > 1 and value.dtype == "float32" and np.all(np.abs(value) <= np.finfo("float16").max):
            weight.assign(value.astype("float16"))
    return folded, report.summary()


def _describe(proto, folded):
    import onnx

    proto.producer_name, proto.producer_version = "keras_proxynorm", keras_proxynorm.__version__
    versions = {"keras_proxynorm": keras_proxynorm.__version__, "keras": keras.__version__}
    onnx.helper.set_model_props(proto, {**versions, "folded": folded})


def _check(path, opset):
    import onnx

    try:
        # By its path, which has no limit of size.
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"Argument `model` gives a graph that is not valid ONNX of opset {opset}: {error}") from error
