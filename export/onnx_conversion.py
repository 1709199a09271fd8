"""A function of TensorFlow as an ONNX model, converted by tf2onnx."""

import collections
import threading
from collections.abc import Callable, Sequence

import keras
import numpy as np

from keras_proxynorm import compat
from keras_proxynorm.export.logs import errors_of
from keras_proxynorm.export.onnx_layout import infer_tensors, names_read, remove_transposes
from keras_proxynorm.export.onnx_weights import initializer, is_large, value_of

__all__ = ["check_opset", "convert"]

# Read by every ONNX Runtime since 1.12; the default of tf2onnx is older.
_DEFAULT_OPSET = 17
_LOWEST_OPSET = 13
# Bytes of constants that fit into the messages that tf2onnx and TensorFlow exchange.
_LARGEST_MESSAGE = 1.5e9
# Operations of TensorFlow that tf2onnx converts without knowing the values of their weights.
_CONSUMERS = set(
    str.split(
        "BatchMatMulV2 Conv2D Conv2DBackpropInput Conv3D Conv3DBackpropInputV2 DepthwiseConv2dNative Einsum GatherV2 "
        "MatMul"
    )
)
# Operations of TensorFlow, and then of ONNX, that change only the shape or the dtype of a weight.
_TENSORFLOW_RESHAPING = {"Cast", "ExpandDims", "Identity", "Reshape", "Squeeze", "Transpose"}
_ONNX_RESHAPING = {"Cast", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
# tf2onnx keeps the functions of the graph that it converts in a global dict.
_one_conversion_at_a_time = threading.Lock()


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

    highest = compat.highest_opset()
    if opset is None:
        return _DEFAULT_OPSET
    if isinstance(opset, bool) or not isinstance(opset, int) or not _LOWEST_OPSET <= opset <= highest:
        raise ValueError(
            f"Argument `opset` must be an integer from {_LOWEST_OPSET} to {highest}, which tf2onnx "
            f"{tf2onnx.__version__} can write. Received: opset={opset!r}"
        )
    return opset


def convert(serve: Callable, signature: Sequence, opset: int, weights: Sequence[keras.Variable] = ()) -> tuple:
    """Converts a function of tensors that returns a dict of tensors.

    Args:
        serve: The function.
        signature: List of named `tf.TensorSpec`, one for each argument.
        opset: The version of the ONNX operator set.
        weights: The variables that the function may read. Large ones bypass tf2onnx, which copies a constant at each
            of its steps.

    Returns:
        ``(proto, arrays)``: an `onnx.ModelProto`, with the names of the signature and of the dict, and in their order;
        and the values of its large weights, by name, see `onnx_weights`.

    Raises:
        ValueError: If an operation has no ONNX form, or if an input and an output have the same name.
    """
    weights = [weight for weight in weights if is_large(weight.shape, keras.backend.standardize_dtype(weight.dtype))]
    function = _trace(serve, signature, weights)
    inputs = {tensor.name: spec.name for tensor, spec in zip(function.inputs, signature, strict=False)}
    outputs = {tensor.name: name for name, tensor in function.structured_outputs.items()}
    shared = {*inputs.values()} & {*outputs.values()}
    if shared:
        raise ValueError(
            "Argument `model` must have outputs that are not named like its inputs, because ONNX has one set of "
            f"names for both. Received: an input and an output with name={shared.pop()!r}"
        )
    graph, bypassing = _freeze(function, [*inputs], [*outputs], _values(function, len(signature), weights))
    inputs.update({name: name.partition(":")[0] for name in bypassing})
    proto = _run_tf2onnx(graph, inputs, outputs, opset)
    arrays: dict[str, np.ndarray] = {}
    _inputs_to_constants(proto, {inputs[name]: value for name, value in bypassing.items()}, arrays)
    _take_out_large(proto, arrays)
    _compute_weights(proto, arrays)
    remove_transposes(proto, arrays)
    _keep_zeros_before_poolings(proto)
    _remove_unused_weights(proto, arrays)
    return proto, arrays


def _trace(serve, signature, weights):
    """The function as a concrete one that takes the values of weights after its own arguments."""
    import tensorflow as tf

    def traced(*tensors):
        values = tensors[len(signature) :]
        with keras.StatelessScope(state_mapping=list(zip(weights, values, strict=True))):
            return serve(*tensors[: len(signature)])

    specs = [tf.TensorSpec(x.shape, x.dtype, f"keras_proxynorm.weight.{i}") for i, x in enumerate(weights)]
    return tf.function(traced, input_signature=[*signature, *specs], autograph=False).get_concrete_function()


def _values(function, first, weights):
    """The values of what a concrete function takes from argument number `first` on and what it refers to, by name."""
    given = zip(function.inputs[first:], [*weights, *function.captured_inputs], strict=True)
    return {tensor.name: keras.ops.convert_to_numpy(x) for tensor, x in given if tensor.dtype != "resource"}


def _freeze(function, inputs, outputs, values):
    """The graph of a concrete function, with all `values` as constants but large ones whose consumers allow it.

    Returns:
        ``(graph, bypassing)``: the GraphDef, and the values that it takes as inputs, by name.
    """
    import tensorflow as tf

    variables = sum(variable.dtype.size * variable.shape.num_elements() for variable in function.variables)
    _check_size(variables)
    graph = compat.frozen_graph(function, [*inputs, *values], outputs)
    consumers = _consumers(graph)
    bypassing = {name: x for name, x in values.items() if is_large(x.shape, x.dtype) and consumers(name) <= _CONSUMERS}
    constants = {name: x for name, x in values.items() if name not in bypassing}
    _check_size(variables + sum(x.nbytes for x in constants.values()))
    if not constants:
        return graph, bypassing
    for node in graph.node:
        if (value := constants.get(f"{node.name}:0")) is not None:
            node.op = "Const"
            node.attr.clear()
            node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    return compat.optimized_graph(graph, [*inputs, *bypassing], outputs), bypassing


def _check_size(size):
    if size > _LARGEST_MESSAGE:
        raise ValueError(
            "Argument `model` must have less than 1.5 GB of weights that its layers do not read as they are, such as "
            "those of recurrent layers, because the converter takes no more; use export_saved_model, which does. "
            f"Received: {size / 1e9:.1f} GB"
        )


def _consumers(graph):
    """A function that gives the types of the operations that read a tensor, or read it in another shape or dtype."""
    nodes = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            nodes[name.partition(":")[0]].append(node)

    def types(name):
        found: set[str] = set()
        for node in nodes[name.partition(":")[0]]:
            found |= types(node.name) if node.op in _TENSORFLOW_RESHAPING else {node.op}
        return found

    return types


def _run_tf2onnx(graph, inputs, outputs, opset):
    import tf2onnx.convert  # noqa: F401, so that its loggers exist

    with _one_conversion_at_a_time, errors_of("tf2onnx") as errors:
        try:
            proto = compat.onnx_of_graph(graph, inputs, outputs, opset, [_replace_operations])
        except Exception as error:
            # Operations that it has no form for make it fail later, too.
            if not errors:
                error.add_note("Raised by tf2onnx; export_saved_model does not need it.")
                raise
    # It only logs what it cannot convert, and goes on with a graph that no runtime can read.
    if errors:
        raise ValueError(
            "Argument `model` must consist of operations that have an ONNX form. Replace the layer in question, or use "
            "export_saved_model, which takes them all. Received from tf2onnx:\n" + "\n".join(errors)
        )
    return proto


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
    """Computes operations that only give a weight another shape or dtype."""
    import onnx.reference

    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in list(proto.graph.node):
        if node.op_type not in _ONNX_RESHAPING or not constants.keys() >= {*node.input}:
            continue
        values = {name: value_of(constants[name], arrays) for name in node.input}
        (value,) = onnx.reference.ReferenceEvaluator(node, opsets=opsets).run(None, values)
        constants[node.output[0]] = initializer(node.output[0], np.asarray(value), arrays)
        proto.graph.initializer.append(constants[node.output[0]])
        proto.graph.node.remove(node)


def _remove_unused_weights(proto, arrays):
    names = set(names_read(proto.graph))
    weights = [tensor for tensor in proto.graph.initializer if tensor.name in names]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(weights)
    for name in arrays.keys() - names:
        del arrays[name]


def _keep_zeros_before_poolings(proto):
    """Makes the zeros that are padded before poolings negative.

    ONNX Runtime before 1.32 merges a padding with zeros into the pooling after it, which then leaves the zeros out:
    wrong where all values in a window are negative. It does not merge a padding with negative zeros.
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


def _replace_operations(graph, nodes):
    """Replaces operations in a graph of tf2onnx by operations of ONNX that it would not use."""
    rules = _replace_erfc, _replace_expm1, _replace_batch_norm, _add_up_biases, _find_hard_sigmoid, _find_hard_swish
    for rule in rules:
        for node in list(graph.get_nodes()):
            rule(graph, node)
    return graph.get_nodes()


def _replace_erfc(graph, node):
    """``1 - erf(x)``, for Keras's exact gelu."""
    if node.type == "Erfc":
        _replace(graph, node, "Sub", [_one(graph, node), _apply(graph, "Erf", node)])


def _replace_expm1(graph, node):
    """``exp(x) - 1``, for celu."""
    if node.type == "Expm1":
        _replace(graph, node, "Sub", [_apply(graph, "Exp", node), _one(graph, node)])


def _replace_batch_norm(graph, node):
    """InstanceNormalization: what a folded normalization means by a batch norm in training."""
    if node.type == "FusedBatchNormV3" and node.get_attr_value("is_training"):
        _replace(graph, node, "InstanceNormalization", node.input[:3], epsilon=node.get_attr_value("epsilon"))


def _add_up_biases(graph, node):
    """Convolutions with one bias: tf2onnx makes an input of each of two, which is no valid ONNX."""
    if node.type == "Conv2D" and len(node.input) == 4:
        bias = graph.make_node("Add", node.input[2:], skip_conversion=True)
        graph.replace_inputs(node, [*node.input[:2], bias.output[0]])


def _find_hard_sigmoid(graph, node):
    """``relu6(x + 3) / 6``, as Keras computes it: ONNX Runtime has one kernel for it."""
    clipped = _operand(graph, node, "Mul", 1 / 6) or _operand(graph, node, "RealDiv", 6)
    relu6 = clipped and graph.get_node_by_output(clipped)
    if relu6 and relu6.type == "Relu6" and (x := _operand(graph, relu6.inputs[0], "AddV2", 3)):
        _replace(graph, node, "HardSigmoid", [x], alpha=1 / 6, beta=0.5)


def _find_hard_swish(graph, node):
    """``x * hard_sigmoid(x)``: OpenVINO has one kernel for it."""
    if node.type == "Mul" and graph.opset >= 14:
        for x, factor in (node.input, node.input[::-1]):
            other = graph.get_node_by_output(factor)
            if other and other.type == "HardSigmoid" and other.input[0] == x:
                _replace(graph, node, "HardSwish", [x])
                return


def _operand(graph, node, op, constant):
    """The name of `x` if `node` is ``op(x, constant)``, or None."""
    if node is None or node.type != op:
        return None
    for x, other in (node.input, node.input[::-1])[: 1 if op == "RealDiv" else 2]:
        value = graph.get_node_by_output(other)
        if value and value.is_const() and np.allclose(value.get_tensor_value(as_list=False), constant, rtol=1e-6):
            return x
    return None


def _replace(graph, node, op, inputs, **attributes):
    """Puts an operation of ONNX in the place of a node, with the first of its outputs."""
    outputs, shapes, dtypes = node.output[:1], node.output_shapes[:1], node.output_dtypes[:1]
    graph.remove_node(node.name)
    graph.make_node(op, inputs, attributes, outputs=outputs, shapes=shapes, dtypes=dtypes, skip_conversion=True)


def _apply(graph, op, node):
    """The name of ``op(x)`` for the input `x` of a node."""
    shapes, dtypes = node.output_shapes, node.output_dtypes
    return graph.make_node(op, node.input, shapes=shapes, dtypes=dtypes, skip_conversion=True).output[0]


def _one(graph, node):
    """The name of a constant 1 of the dtype of a node."""
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(node.output_dtypes[0])
    return graph.make_const(f"{node.name}__one", np.array(1, dtype)).output[0]
