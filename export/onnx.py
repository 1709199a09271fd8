"""Export to ONNX, for ONNX Runtime, OpenVINO and other inference engines."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np

import keras_proxynorm
from keras_proxynorm.arguments import as_boolean
from keras_proxynorm.export.atomic import check_free, local_path, replacing
from keras_proxynorm.export.inference_model import folded_copy, inference_model, unfolded_model
from keras_proxynorm.export.onnx_conversion import check_opset, convert
from keras_proxynorm.export.onnx_weights import data_files, save, store_as_float16
from keras_proxynorm.export.open_sizes import has_open_sizes
from keras_proxynorm.export.precision import in_float32
from keras_proxynorm.export.repeatability import check_repeatable
from keras_proxynorm.export.serving_function import serving_function
from keras_proxynorm.export.verification import fitting_runtimes, verify_served

__all__ = ["export_onnx"]


def export_onnx(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    batch_size: int | None = 1,
    input_shape: Sequence | Mapping | None = None,
    opset: int | None = None,
    dynamic_batch: bool = False,
    fold: bool = True,
    verify: bool | Callable[..., object] = True,
    float16_weights: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes a model as an ONNX file, for ONNX Runtime, OpenVINO and other inference engines.

    The file contains the forward pass only. Its inputs have the names of the model's inputs. Its outputs have the keys
    of the model's output, or the names of the layers that they come from, and are in the model's order. Whatever
    depends only on weights, such as the moments of the proxies, is stored as constants. A normalization becomes an
    InstanceNormalization and a convolution, for which these engines have fast kernels, and images are transposed once,
    at the input. The metadata of the file say what made it and what was folded. The file appears under its name only
    when it is complete, ``onnx.checker`` has accepted it, and it has been compared with the model.

    A model that was trained in mixed precision gives a file that computes in float32, compared with the model at the
    precision of the model.

    ONNX Runtime computes the statistics of a group in float32: over a million elements they are off by 2e-4 of the
    standard deviation, and by all of it where the mean is 1e4 times as large. `verify` looks for that.

    If the weights take more than 1.5 GB, they go into a second file beside the first, ``<name>-<random digits>.data``.
    The export takes about four times the memory of the weights, the model and its folded copy included; and about
    forty times that of large weights that are not read as they are, such as those of recurrent layers and of LoRA.

    Any number of threads may export at once. The part of the work that tf2onnx does is done for one at a time.

    Args:
        model: A built Keras model, on the TensorFlow backend.
        path: The file to write. Its directory is made if it is missing.
        batch_size: Integer, the batch size that the file takes, or None for any. Defaults to 1.
        input_shape: Tuple of integers, the sizes of the input without the batch, or None for a size that stays open; a
            list of tuples in the order of ``model.inputs``, or a dict of tuples by name, for several inputs. Needed
            where the model leaves sizes open, and for subclassed models, whose `call` it describes: a tuple for a
            tensor, a list for a list, a dict for a dict.
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
            an ONNX form, if it draws random numbers or keeps state at inference, or if an argument is not of the form
            above.
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
    target = local_path("path", path)
    if target.is_dir():
        raise ValueError(f"Argument `path` must be a file, not a directory. Received: path={str(target)!r}")
    as_boolean("fold", fold)
    as_boolean("dynamic_batch", dynamic_batch)
    as_boolean("float16_weights", float16_weights)
    if not callable(verify):
        as_boolean("verify", verify)
    check_free(target, overwrite)
    opset = check_opset(opset)
    if dynamic_batch:
        if batch_size not in (None, 1):
            raise ValueError(
                "Argument `batch_size` must not be given with dynamic_batch=True, which means any. "
                f"Received: batch_size={batch_size!r}"
            )
        batch_size = None
    if verify is True:
        fitting_runtimes(target)
    # Checks the arguments, before anything that takes time.
    _, signature = serving_function(model, batch_size, input_shape)
    open_sizes = has_open_sizes(signature)
    if float16_weights:
        served, folded = _with_float16_kernels(model, fold, open_sizes)
    elif fold:
        served, folded = inference_model(model, "onnx", through_gates=True, open_sizes=open_sizes)
    else:
        served, folded = unfolded_model(model, open_sizes=open_sizes), "nothing"
    served = in_float32(served, model)
    serve, _ = serving_function(model, batch_size, input_shape, served)
    check_repeatable(served, serve, signature)
    proto, arrays = convert(serve, signature, opset, served.variables)
    if float16_weights:
        store_as_float16(proto, arrays)
    _describe(proto, folded)
    old, new = data_files(target), None
    try:
        with replacing(target, overwrite) as temporary:
            data = save(proto, arrays, temporary, target.name)
            # Checking the file needs the memory.
            del proto, arrays
            _check(temporary, opset)
            if verify is True:
                # The user asked for rounded kernels; nothing else may differ.
                verify_served(model, served if float16_weights else model, temporary, input_shape=input_shape)
            elif verify:
                verify(model, temporary, input_shape=input_shape)
            if data is not None:
                # First, because the file refers to it. An old file refers to another.
                new = data.replace(target.parent / data.name)
    except BaseException:
        if new is not None:
            new.unlink()
        raise
    for name in old:
        (target.parent / name).unlink(missing_ok=True)
    return target


def _with_float16_kernels(model, fold, open_sizes):
    """The folded model with kernels rounded to float16, and what was folded."""
    if not fold:
        raise ValueError(
            "Argument `float16_weights` needs fold=True, which makes a copy of the model that can be changed. "
            "Received: float16_weights=True, fold=False"
        )
    folded, report = folded_copy(model, "onnx", through_gates=True, open_sizes=open_sizes)
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
