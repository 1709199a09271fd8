"""Export to ONNX by way of tf2onnx; nothing else in the package touches the converter."""

import functools
import os
from pathlib import Path

import keras
import numpy as np

from keras_proxynorm.export.atomic import check_free
from keras_proxynorm.export.atomic import local_path
from keras_proxynorm.export.atomic import replacing
from keras_proxynorm.export.logs import errors_of
from keras_proxynorm.export.serving_function import serving_function

__all__ = ["export_onnx"]

# Read by every ONNX Runtime since 1.12; the converter's own default is older.
_DEFAULT_OPSET = 17
_LOWEST_OPSET = 13


def export_onnx(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    batch_size: int | None = 1,
    input_shape=None,
    opset: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model as an ONNX file, for ONNX Runtime and other inference engines.

    The file has the forward pass only. Its inputs have the names of the model's inputs, its outputs the keys of the
    model's output or the names of the layers that they come from, in the model's order. What depends on weights alone,
    the moments of the proxies above all, is computed here and stored as constants. The file appears under its name only
    when it is complete and ``onnx.checker`` has accepted it.

    Args:
        model: A built Keras model, on the TensorFlow backend.
        path: The file to write. Its directory is made if it is missing.
        batch_size: Integer, the batch size that the file takes, or None for any. Defaults to 1.
        input_shape: Tuple of integers, the sizes of the input without the batch; a list of tuples in the order of
            ``model.inputs``, or a dict of tuples by name, for several inputs. Needed where the model leaves sizes
            open, and for subclassed models, whose `call` it describes: a tuple for a tensor, a list for a list, a dict
            for a dict.
        opset: Integer, the version of the ONNX operator set. Defaults to 17.
        overwrite: If True, replace `path` if it exists. Defaults to False.

    Returns:
        `path` as a `pathlib.Path`.

    Raises:
        RuntimeError: If the Keras backend is not TensorFlow.
        ImportError: If tf2onnx or onnx is not installed.
        ValueError: If the model is not built, if its shapes are not known and not given, if it has an operation without
            an ONNX form, or if an argument is not of the form above.
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
    serve, signature = serving_function(model, batch_size, input_shape)
    proto = _convert(serve, signature, opset)
    with replacing(path, overwrite) as temporary:
        temporary.write_bytes(proto.SerializeToString())
    return path


def _convert(serve, signature, opset):
    import tensorflow as tf

    try:
        import onnx
        import tf2onnx.convert
    except ImportError as error:
        raise ImportError('Exporting to ONNX needs: pip install "tf2onnx>=1.17" "onnx>=1.17"') from error

    highest = max(tf2onnx.constants.OPSET_TO_IR_VERSION)
    if opset is None:
        opset = _DEFAULT_OPSET
    elif isinstance(opset, bool) or not isinstance(opset, int) or not _LOWEST_OPSET <= opset <= highest:
        raise ValueError(
            f"Argument `opset` must be an integer from {_LOWEST_OPSET} to {highest}, which tf2onnx "
            f"{tf2onnx.__version__} can write. Received: opset={opset!r}"
        )
    output_names = []

    def traced(*tensors):
        outputs = serve(*tensors)
        output_names[:] = outputs
        return outputs

    function = tf.function(traced, input_signature=signature, autograph=False)
    with errors_of("tf2onnx") as errors:
        function.get_concrete_function()
        shared = {spec.name for spec in signature} & set(output_names)
        if shared:
            raise ValueError(
                "Argument `model` must have outputs that are not named like its inputs, because ONNX has one set of "
                f"names for both. Received: an input and an output with name={shared.pop()!r}"
            )
        try:
            proto, _ = tf2onnx.convert.from_function(
                function, signature, opset=opset, custom_op_handlers={"Erfc": (_erfc, []), "Expm1": (_expm1, [])}
            )
        except Exception as error:
            raise ValueError(f"Argument `model` has no form in ONNX of opset {opset}: {error}") from error
    # The converter only logs what it cannot convert, and goes on with a graph that no runtime can read.
    if errors:
        raise ValueError(
            "Argument `model` must consist of operations that have an ONNX form. Replace the layer in question, or use "
            "export_saved_model, which takes them all. Received from tf2onnx:\n" + "\n".join(errors)
        )
    # TensorFlow sorts them by name.
    proto.graph.output.sort(key=lambda output: output_names.index(output.name))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"Argument `model` gives a graph that is not valid ONNX of opset {opset}: {error}") from error
    return proto


def _erfc(context, node, name, args):
    """1 - Erf(x): tf2onnx has no Erfc, which Keras's exact gelu is made of."""
    one, erf, make_output = _begin_replacement(context, node, "Erf")
    make_output("Sub", [one, erf])


def _expm1(context, node, name, args):
    """Exp(x) - 1: tf2onnx has no Expm1, which celu is made of."""
    one, exp, make_output = _begin_replacement(context, node, "Exp")
    make_output("Sub", [exp, one])


def _begin_replacement(context, node, op):
    """Removes `node` and gives the constant 1, `op` of its input, and a function that makes its output anew."""
    from tf2onnx import utils

    (x,), (output,) = node.input, node.output
    shape, dtype = context.get_shape(output), context.get_dtype(output)
    context.remove_node(node.name)
    one = context.make_const(utils.make_name("one"), np.array(1, utils.map_onnx_to_numpy_type(dtype)))
    inner = context.make_node(op, [x], shapes=[shape], dtypes=[dtype])
    make_output = functools.partial(context.make_node, outputs=[output], shapes=[shape], dtypes=[dtype])
    return one.output[0], inner.output[0], make_output
