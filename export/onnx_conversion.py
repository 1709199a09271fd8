"""A function of TensorFlow as an ONNX model, by way of tf2onnx; nothing else in the package touches the converter."""

import collections
import contextlib
import functools
from collections.abc import Callable
from collections.abc import Sequence

import keras
import numpy as np

from keras_proxynorm.export.logs import errors_of
from keras_proxynorm.export.onnx_layout import infer_tensors
from keras_proxynorm.export.onnx_layout import remove_transposes
from keras_proxynorm.export.onnx_weights import initializer
from keras_proxynorm.export.onnx_weights import is_large
from keras_proxynorm.export.onnx_weights import value_of

__all__ = ["check_opset", "convert"]

# Read by every ONNX Runtime since 1.12; the converter's own default is older.
_DEFAULT_OPSET = 17
_LOWEST_OPSET = 13
# Bytes of constants that the converter can be given in one message.
_LARGEST_MESSAGE = 1.5e9
# Operations of TensorFlow that the converter takes a weight for that is not a constant, without a loss.
_READERS = {
    *str.split(
        "BatchMatMulV2 Conv2D Conv2DBackpropInput Conv3D Conv3DBackpropInputV2 DepthwiseConv2dNative Einsum GatherV2 "
        "MatMul"
    )
}
# Operations of TensorFlow, and then of ONNX, that change the shape or the dtype of a weight and nothing else.
_TENSORFLOW_RESHAPING = {"Cast", "ExpandDims", "Identity", "Reshape", "Squeeze", "Transpose"}
_ONNX_RESHAPING = {"Cast", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def check_opset(opset: int | None) -> int:
    """The version of the ONNX operator set to write.

    Raises:
        ImportError: If tf2onnx or onnx is not installed.
        ValueError: If tf2onnx cannot write it.
    """
    try:
        import onnx  # noqa: F401
        import tf2onnx
    except ImportError as error:
        raise ImportError('Exporting to ONNX needs: pip install "tf2onnx>=1.17" "onnx>=1.17"') from error

    highest = max(tf2onnx.constants.OPSET_TO_IR_VERSION)
    if opset is None:
        return _DEFAULT_OPSET
    if isinstance(opset, bool) or not isinstance(opset, int) or not _LOWEST_OPSET <= opset <= highest:
        raise ValueError(
            f"Argument `opset` must be an integer from {_LOWEST_OPSET} to {highest}, which tf2onnx "
            f"{tf2onnx.__version__} can write. Received: opset={opset!r}"
        )
    return opset


def convert(serve: Callable, signature: list, opset: int, weights: Sequence = ()) -> tuple:
    """Converts a function of tensors that returns a dict of tensors.

    Args:
        serve: The function.
        signature: List of named `tf.TensorSpec`, one for each argument.
        opset: The version of the ONNX operator set.
        weights: The variables of Keras that the function may read. Large ones are spared the converter, which copies
            a constant at each of its steps.

    Returns:
        ``(proto, arrays)``: an `onnx.ModelProto`, with the names of the signature and of the dict, and in their order;
        and the values of its large weights, by name, see `onnx_weights`.

    Raises:
        ValueError: If an operation has no ONNX form, or if an input and an output have the same name.
    """
    import tf2onnx.convert

    with errors_of("tf2onnx") as errors:
        function, inputs, names, spared = _trace(serve, signature, [weight for weight in weights if _is_spared(weight)])
        concrete = function.get_concrete_function()
        size = sum(variable.dtype.size * int(np.prod(variable.shape)) for variable in concrete.variables)
        if size > _LARGEST_MESSAGE:
            raise ValueError(
                "Argument `model` must have less than 1.5 GB of weights that its layers do not read as they are, such "
                "as those of recurrent layers, because the converter takes no more; use export_saved_model, which "
                f"does. Received: {size / 1e9:.1f} GB"
            )
        shared = {spec.name for spec in signature} & set(names)
        if shared:
            raise ValueError(
                "Argument `model` must have outputs that are not named like its inputs, because ONNX has one set of "
                f"names for both. Received: an input and an output with name={shared.pop()!r}"
            )
        handlers = {"Erfc": _erfc, "Expm1": _expm1, "FusedBatchNormV3": _instance_normalization}
        try:
            proto, _ = tf2onnx.convert.from_function(
                function,
                inputs,
                opset=opset,
                custom_op_handlers={op: (handler, []) for op, handler in handlers.items()},
                custom_rewriter=[_find_hard_sigmoids],
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
    proto.graph.output.sort(key=lambda output: names.index(output.name))
    arrays: dict[str, np.ndarray] = {}
    _inputs_to_constants(proto, {**spared, **_captured(concrete)}, arrays)
    _take_out_large(proto, arrays)
    _compute_weights(proto, arrays)
    remove_transposes(proto, arrays)
    _merge_affines(proto, arrays)
    _keep_zeros_in_front_of_poolings(proto)
    _remove_unused_weights(proto, arrays)
    return proto, arrays


def _is_spared(weight):
    return is_large(weight.shape, keras.backend.standardize_dtype(weight.dtype))


def _trace(serve, signature, weights):
    """The function with weights as inputs.

    Returns:
        ``(function, signature, names, values)``: the function with its signature, the names of its outputs, and the
        values of the weights among its inputs, by name.
    """
    import tensorflow as tf

    names: list[str] = []
    specs = [tf.TensorSpec(x.shape, x.dtype, f"keras_proxynorm.weight.{i}") for i, x in enumerate(weights)]

    def traced(*tensors):
        values = tensors[len(signature) :]
        with _functions_inlined(), keras.StatelessScope(state_mapping=list(zip(weights, values, strict=True))):
            outputs = serve(*tensors[: len(signature)])
        names[:] = outputs
        return outputs

    function = tf.function(traced, input_signature=[*signature, *specs], autograph=False)
    tensors = function.get_concrete_function().inputs[len(signature) :]
    readers = [_readers(tensor) for tensor in tensors[: len(specs)]]
    spared = [weight for weight, types in zip(weights, readers, strict=True) if types <= _READERS]
    if len(spared) < len(weights):
        # Whether a weight can be an input is known only when all that reads it is traced.
        return _trace(serve, signature, spared)
    values = {spec.name: keras.ops.convert_to_numpy(weight) for spec, weight in zip(specs, weights, strict=True)}
    return function, [*signature, *specs], names, values


@contextlib.contextmanager
def _functions_inlined():
    """Traces functions inside of a function as if they were none: Keras has some for XLA, which no converter reads."""
    import tensorflow as tf

    eagerly = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(eagerly)


def _readers(tensor):
    """The types of the operations that read a tensor, or something of another shape or dtype."""
    types = set()
    for reader in tensor.consumers():
        if reader.type in _TENSORFLOW_RESHAPING:
            types |= _readers(reader.outputs[0])
        else:
            types.add(reader.type)
    return types


def _captured(concrete):
    """The values of the tensors that a function refers to, by name."""
    own = len(concrete.inputs) - len(concrete.captured_inputs)
    return {
        tensor.name: value.numpy()
        for tensor, value in zip(concrete.inputs[own:], concrete.captured_inputs, strict=True)
        if tensor.dtype != "resource"
    }


def _inputs_to_constants(proto, values, arrays):
    """Makes inputs of the graph constants."""
    inputs = [tensor for tensor in proto.graph.input if tensor.name not in values]
    constants = [initializer(t.name, values[t.name], arrays) for t in proto.graph.input if t.name in values]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    proto.graph.initializer.extend(constants)


def _take_out_large(proto, arrays):
    """Makes arrays of the large constants that went through the converter."""
    import onnx

    for tensor in proto.graph.initializer:
        if tensor.HasField("raw_data") and is_large(
            tensor.dims, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        ):
            tensor.CopyFrom(initializer(tensor.name, onnx.numpy_helper.to_array(tensor), arrays))


def _compute_weights(proto, arrays):
    """Computes what only gives large weights another shape or dtype."""
    import onnx.reference

    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in list(proto.graph.node):
        if node.op_type not in _ONNX_RESHAPING or node.input[0] not in arrays or not constants.keys() >= {*node.input}:
            continue
        values = {name: value_of(constants[name], arrays) for name in node.input}
        (value,) = onnx.reference.ReferenceEvaluator(node, opsets=opsets).run(None, values)
        constants[node.output[0]] = initializer(node.output[0], value, arrays)
        proto.graph.initializer.append(constants[node.output[0]])
        proto.graph.node.remove(node)


def _merge_affines(proto, arrays):
    """Makes what is multiplied with and added to the channels behind a convolution part of its kernel and bias.

    The converter does it for most, but not with the weights that it is spared.
    """
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    readers = collections.Counter(name for node in proto.graph.node for name in node.input)
    readers.update(output.name for output in proto.graph.output)
    convolutions = {}

    def add_constant(name, value):
        constants[name] = initializer(name, value, arrays)
        proto.graph.initializer.append(constants[name])
        return name

    for node in list(proto.graph.node):
        if node.op_type == "Conv" and {*node.input[1:]} <= constants.keys():
            convolutions[node.output[0]] = node
        if node.op_type not in ("Add", "Mul"):
            continue
        for name, other in (node.input, node.input[::-1]):
            convolution = convolutions.get(name)
            if convolution is None or other not in constants or readers[name] > 1:
                continue
            kernel = value_of(constants[convolution.input[1]], arrays)
            shape = (len(kernel), *(1 for _ in kernel.shape[2:]))
            value = value_of(constants[other], arrays)
            if value.shape not in (shape, (1, *shape)):
                continue
            value = value.reshape(-1)
            bias = value_of(constants[convolution.input[2]], arrays) if len(convolution.input) > 2 else None
            if node.op_type == "Mul":
                scaled = kernel * value.reshape(-1, *(1 for _ in kernel.shape[1:]))
                convolution.input[1] = add_constant(f"{node.output[0]}__kernel", scaled)
                bias = None if bias is None else bias * value
            else:
                bias = value if bias is None else bias + value
            if bias is not None:
                convolution.input[2:] = [add_constant(f"{node.output[0]}__bias", bias)]
            convolution.output[0] = node.output[0]
            convolutions[node.output[0]] = convolution
            proto.graph.node.remove(node)
            break


def _remove_unused_weights(proto, arrays):
    def used(graph):
        for node in graph.node:
            yield from node.input
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    yield from used(inner)
        yield from (output.name for output in graph.output)

    names = set(used(proto.graph))
    weights = [tensor for tensor in proto.graph.initializer if tensor.name in names]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(weights)
    for name in arrays.keys() - names:
        del arrays[name]


def _keep_zeros_in_front_of_poolings(proto):
    """Makes the zeros that are padded in front of poolings negative.

    ONNX Runtime takes a padding with zeros into the pooling behind it, which then leaves them out: wrong where all that
    is in a window is negative. It does not where a bit of the zero is set.
    """
    import onnx

    pooled = {node.input[0] for node in proto.graph.node if node.op_type in ("AveragePool", "MaxPool")}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    types = {value.name: value.type.tensor_type.elem_type for value in infer_tensors(proto)} if pooled else {}
    for node in proto.graph.node:
        if node.op_type != "Pad" or node.output[0] not in pooled or len(node.input) > 3:
            continue
        if len(node.input) == 3 and node.input[2]:
            value = constants.get(node.input[2])
            zero = value and onnx.numpy_helper.to_array(value)
        else:
            zero = np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(types[node.output[0]]))
        if zero is not None and zero == 0 and zero.dtype.kind == "f":
            name = f"{node.output[0]}__negative_zero"
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.negative(zero), name))
            node.input[:] = [*node.input[:2], name]


def _find_hard_sigmoids(graph, nodes):
    """Makes HardSigmoid of ``relu6(x + 3) / 6``, as Keras computes it: one kernel, which convolutions contain."""
    from tf2onnx.graph_matcher import GraphMatcher
    from tf2onnx.graph_matcher import OpTypePattern

    shifted = OpTypePattern("AddV2", inputs=[OpTypePattern("*", name="x"), OpTypePattern("Const", name="shift")])
    clipped = OpTypePattern("Relu6", inputs=[shifted])
    pattern = OpTypePattern("Mul|RealDiv", name="outputs", inputs=[clipped, OpTypePattern("Const", name="factor")])
    for match in list(GraphMatcher(pattern, allow_reorder=True).match_ops(nodes)):
        outputs = match.get_op("outputs")
        shift, factor = (np.asarray(match.get_op(name).get_tensor_value()) for name in ("shift", "factor"))
        if outputs.type == "RealDiv":
            factor = 1 / factor if outputs.inputs[1] is match.get_op("factor") else np.nan
        if np.all(shift == 3) and np.allclose(factor, 1 / 6):
            hard_sigmoid = graph.make_node(
                "HardSigmoid",
                [match.get_tensor("x")],
                attr={"alpha": 1 / 6, "beta": 0.5},
                shapes=outputs.output_shapes,
                dtypes=outputs.output_dtypes,
                skip_conversion=True,
            )
            graph.replace_all_inputs(outputs.output[0], hard_sigmoid.output[0])
    return graph.get_nodes()


def _instance_normalization(context, node, name, args):
    """InstanceNormalization: what `inference_step` means by a batch normalization of batches of one."""
    from tf2onnx.onnx_opset.nn import BatchNorm

    if not node.get_attr_value("is_training"):
        BatchNorm.version_9(context, node)
        return
    inputs, output, epsilon = node.input[:3], node.output[0], node.get_attr_value("epsilon")
    shape, dtype = context.get_shape(output), context.get_dtype(output)
    context.remove_node(node.name)
    attributes = {"epsilon": epsilon}
    context.make_node(
        "InstanceNormalization", inputs, attr=attributes, outputs=[output], shapes=[shape], dtypes=[dtype]
    )


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
