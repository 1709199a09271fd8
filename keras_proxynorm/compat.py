"""Every private name of Keras, TensorFlow and tf2onnx that the package uses, behind functions of its own.

Each function has a test that says what broke if a new version moves the name.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import keras

__all__ = [
    "Node",
    "convert_arguments_like",
    "convert_variables_to_constants",
    "copy_rematerialization",
    "exclude_further_from_weight_decay",
    "excludes_from_weight_decay",
    "frozen_graph",
    "functional_class",
    "highest_opset",
    "is_compiled_by_xla",
    "lambda_output_shape",
    "layers_inside",
    "nodes_of",
    "onnx_of_graph",
    "optimized_graph",
    "own_mask",
    "own_variables",
    "rematerialization_mode",
    "track_loss",
    "update_metrics",
    "xla_optimization_barrier",
    "xla_reduce_precision",
]


class Node(NamedTuple):
    """One call of an operation while a functional model was made."""

    operation: keras.Operation
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[keras.KerasTensor, ...]
    is_input: bool


def nodes_of(functional: keras.Model) -> Iterator[Node]:
    """The calls in a functional model, each after those that it reads."""
    order = {operation: index for index, operation in enumerate(functional.operations)}
    for _, nodes in sorted(functional._nodes_by_depth.items(), reverse=True):
        for node in sorted(nodes, key=lambda node: order[node.operation]):
            yield Node(
                node.operation, node.arguments.args, node.arguments.kwargs, tuple(node.outputs), bool(node.is_input)
            )


def layers_inside(layer: keras.layers.Layer, include_self: bool = True) -> list[keras.layers.Layer]:
    """A layer and all layers that it holds, at any depth; for a model, the layers of the models in it, too."""
    return list(layer._flatten_layers(include_self=include_self))


def exclude_further_from_weight_decay(
    optimizer: keras.optimizers.Optimizer, variables: Iterable[keras.Variable]
) -> None:
    """Excludes variables from the weight decay of an optimizer; what was excluded before stays so."""
    # The public method replaces all that was excluded, and patterns cannot be read from it.
    excluded: set[Any] = getattr(optimizer, "_exclude_from_weight_decay", set())
    optimizer._exclude_from_weight_decay = excluded | {optimizer._var_key(variable) for variable in variables}
    optimizer._exclude_from_weight_decay_cache = {}


def is_compiled_by_xla() -> bool:
    """Whether TensorFlow is tracing a function for XLA."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def xla_optimization_barrier(x):
    """`x`, whose computation XLA does not merge with those after it; TensorFlow, while it traces for XLA."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    return gen_xla_ops.xla_optimization_barrier(input=[x])[0]


def xla_reduce_precision(x, exponent_bits: int, mantissa_bits: int):
    """`x` rounded to a float of that many bits; TensorFlow, while it traces for XLA."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    return gen_xla_ops.xla_reduce_precision(x, exponent_bits, mantissa_bits)


def convert_variables_to_constants(concrete):
    """A concrete function of TensorFlow with the values of its variables as constants."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    return convert_variables_to_constants_v2(concrete)


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The variables that a layer saves itself, trainable ones first: not those of layers in it."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def excludes_from_weight_decay(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether anything was excluded from the weight decay of an optimizer."""
    return any(getattr(optimizer, f"_exclude_from_weight_decay{kind}", None) for kind in ("", "_pattern"))


def copy_rematerialization(source: keras.Operation, target: keras.Operation) -> None:
    """Gives an operation the rematerialization that another one was made with, which no config holds."""
    target._remat_mode = source._remat_mode


def lambda_output_shape(layer: keras.layers.Lambda) -> Any:
    """The argument `output_shape` that a Lambda layer was made with."""
    return layer._output_shape


def convert_arguments_like(wrapper: keras.Model, model: keras.Model) -> None:
    """Makes a model hand its inputs on to another one as they are, if that one takes them so."""
    wrapper._convert_input_args = model._convert_input_args
    wrapper._allow_non_tensor_positional_args = model._allow_non_tensor_positional_args


def track_loss(model: keras.Model, loss: Any, batch_size: Any) -> None:
    """Adds the loss of a batch to the loss that a compiled model reports."""
    model._loss_tracker.update_state(loss, sample_weight=batch_size)


def update_metrics(
    model: keras.Model, variables: Any, loss: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any
) -> tuple[dict[str, Any], Any]:
    """The logs of a training step and the new values of the metrics' variables, without state; JAX only."""
    return model._update_metrics_variables(variables, loss, x, y, y_pred, sample_weight)


@functools.cache
def functional_class() -> Any:
    """The class of functional models."""
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, inputs))


def own_mask(tensor: keras.KerasTensor) -> keras.KerasTensor | None:
    """The mask that follows a symbolic tensor through the calls of layers, without being passed."""
    return getattr(tensor, "_keras_mask", None)


def frozen_graph(concrete, inputs: list[str], outputs: list[str]):
    """A concrete function of TensorFlow as a GraphDef in which variables are constants and functions are inlined.

    Args:
        concrete: The concrete function.
        inputs: Names of the tensors that stay inputs.
        outputs: Names of the tensors that are its outputs.
    """
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    # tf2onnx converts functional loops.
    graph = convert_variables_to_constants_v2(concrete, lower_control_flow=False).graph.as_graph_def(add_shapes=True)
    # Keras compiles grouped convolutions by XLA. TensorFlow inlines no function that is marked for that.
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    for marked in [*graph.library.function, *nodes]:
        for attribute in ("_XlaMustCompile", "_noinline"):
            marked.attr.pop(attribute, None)
    return optimized_graph(graph, inputs, outputs)


def optimized_graph(graph, inputs: list[str], outputs: list[str]):
    """A GraphDef with functions inlined and constants folded, unless the result were larger than its sources."""
    import tensorflow as tf
    from tf2onnx.tf_loader import tf_optimize

    with tf.Graph().as_default():
        return tf_optimize(inputs, outputs, graph)


def highest_opset() -> int:
    """The latest version of the ONNX operator set that tf2onnx writes."""
    from tf2onnx.constants import OPSET_TO_IR_VERSION

    return max(OPSET_TO_IR_VERSION)


def onnx_of_graph(graph, inputs: dict[str, str], outputs: dict[str, str], opset: int, rewriters: list):
    """What tf2onnx makes of a GraphDef: an `onnx.ModelProto`. It logs the operations that have no form in ONNX.

    Args:
        graph: The GraphDef, frozen.
        inputs: For each input by the name of its tensor, the name that it gets.
        outputs: The same for the outputs, in the order that they get.
        opset: Version of the ONNX operator set.
        rewriters: Functions of a graph of tf2onnx and a list of its nodes that change the graph and return all nodes.
    """
    import tensorflow as tf
    from tf2onnx.optimizer import optimize_graph
    from tf2onnx.tfonnx import process_tf_graph

    with tf.device("/CPU:0"), tf.Graph().as_default() as imported:
        tf.import_graph_def(graph, name="")
        converted = process_tf_graph(
            imported,
            continue_on_error=True,
            opset=opset,
            custom_rewriter=rewriters,
            input_names=[*inputs],
            output_names=[*outputs],
            tensors_to_rename={**inputs, **outputs},
        )
        return optimize_graph(converted).make_model("keras_proxynorm")


def rematerialization_mode(operation: keras.Operation) -> str | None:
    """The mode of the `keras.RematScope` that an operation was made within, or None."""
    return operation._remat_mode and operation._remat_mode.mode
