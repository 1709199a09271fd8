"""Undoes in the layers behind it what proxy normalization does to the scale and the offset of an activation."""

import graphlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_proxynorm.surgery.graph import Graph
from keras_proxynorm.surgery.graph import nested_model
from keras_proxynorm.surgery.layer_kinds import CONVOLUTIONS
from keras_proxynorm.surgery.layer_kinds import DEPTHWISE
from keras_proxynorm.surgery.layer_kinds import NORMALIZATIONS
from keras_proxynorm.surgery.layer_kinds import SEPARABLE
from keras_proxynorm.surgery.layer_kinds import passes_affine
from keras_proxynorm.surgery.planning import Plan
from keras_proxynorm.surgery.planning import channel_axis
from keras_proxynorm.surgery.report import Uncompensated

__all__ = ["Compensation", "find_compensations"]


class Rescaling(NamedTuple):
    """What the values of a tensor of the new model meant in the old one: `scale * value + shift` for each channel.

    Attributes:
        axis: The channel axis.
        sources: The paths of the normalizations that it comes from.
        values: Computes scale and shift, two NumPy vectors, from the layers of the new model.
    """

    axis: int
    sources: tuple[str, ...]
    values: Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Compensation:
    """A layer whose weights can take a rescaling of its input back.

    Attributes:
        layer: The layer of the old model.
        path: Its name, behind the names of the models that it is nested in.
        rescaling: That of its input.
    """

    layer: keras.layers.Layer
    path: str
    rescaling: Rescaling

    def apply(self, layer: keras.layers.Layer):
        """Changes the kernel and the bias of `layer`, the clone."""
        scale, shift = self.rescaling.values()
        if isinstance(layer, SEPARABLE):
            depthwise, pointwise = (ops.convert_to_numpy(x) for x in (layer.depthwise_kernel, layer.pointwise_kernel))
            offset = _depthwise_offset(depthwise, shift) @ pointwise.reshape(-1, pointwise.shape[-1])
            layer.depthwise_kernel.assign(depthwise * scale[:, None])
        else:
            kernel = ops.convert_to_numpy(layer.kernel)
            if isinstance(layer, DEPTHWISE):
                offset = _depthwise_offset(kernel, shift)
                layer.kernel.assign(kernel * scale[:, None])
            else:
                scale, shift = (_for_each_filter(x, kernel.shape) for x in (scale, shift))
                offset = (kernel * shift).reshape(-1, kernel.shape[-1]).sum(axis=0)
                layer.kernel.assign(kernel * scale)
        layer.bias.assign(ops.convert_to_numpy(layer.bias) + offset)


def _depthwise_offset(kernel, shift):
    return (kernel.reshape(-1, *kernel.shape[-2:]).sum(axis=0) * shift[:, None]).reshape(-1)


def _for_each_filter(vector, kernel_shape):
    """`vector`, with an entry for each channel, as `(channels / groups, filters)`."""
    channels, filters = kernel_shape[-2:]
    groups = len(vector) // channels
    return np.repeat(vector.reshape(groups, channels), filters // groups, axis=0).T


def find_compensations(
    plan: Plan, layer_of: Callable[[keras.layers.Layer], keras.layers.Layer]
) -> tuple[list[Compensation], list[Uncompensated]]:
    """Follows the output of each layer with proxy normalization to the linear layers that read it.

    Args:
        plan: From `make_plan`.
        layer_of: The layer with the activation that replaces a normalization layer. It is asked for when values are
            computed, not before.

    Returns:
        The layers that can take the rescaling back exactly, and the places where that is not possible.
    """
    return _Search(plan, layer_of).run()


class _Search:
    def __init__(self, plan, layer_of):
        self.plan = plan
        self.layer_of = layer_of
        self.graphs = {id(graph.model): graph for graph in plan.graphs}
        self.results: dict[int, list] = {}
        self.compensations: list[Compensation] = []
        self.uncompensated: list[Uncompensated] = []

    def run(self):
        outermost = self.plan.graphs[0]
        for tensor, rescaling in zip(outermost.outputs, self.outputs(outermost), strict=True):
            if rescaling is not None:
                self.lose([rescaling], outermost.path + tensor.operation, "it is an output of the model")
        return self.compensations, self.uncompensated

    def lose(self, rescalings, path, reason):
        sources = tuple(source for rescaling in rescalings for source in rescaling.sources)
        self.uncompensated.append(Uncompensated(path, reason, sources))

    def outputs(self, graph: Graph):
        """The rescaling of each output of `graph`, or None."""
        if id(graph.model) not in self.results:
            self.results[id(graph.model)] = self.follow(graph)
        return self.results[id(graph.model)]

    def follow(self, graph):
        makers = {call.output[:2]: call for call in graph.calls}
        order = graphlib.TopologicalSorter({place: [x[:2] for x in call.inputs] for place, call in makers.items()})
        rescalings = {}
        for place in order.static_order():
            if place in makers:
                call = makers[place]
                given = [rescalings.get(tensor) for tensor in call.inputs]
                for index, rescaling in enumerate(self.behind(graph, call, given)):
                    rescalings[call.output._replace(output_index=index)] = rescaling
        return [rescalings.get(tensor) for tensor in graph.outputs]

    def behind(self, graph, call, given):
        """The rescalings of the outputs of `call`, from those of its inputs."""
        operation, path = call.operation, graph.path + call.operation.name
        decision = self.plan.absorbing(graph, call)
        if decision is not None:
            return [self.source(decision, graph.shapes[call.inputs[0]])]
        nested = nested_model(operation)
        rescalings = [] if nested is None else self.outputs(self.graphs[id(nested)])
        if nested is not operation:  # TimeDistributed has one more axis, of time
            rescalings = [x and x._replace(axis=x.axis + 1) for x in rescalings]
        rescaled = [rescaling for rescaling in given if rescaling is not None]
        if not rescaled:
            return rescalings
        if passes_affine(operation):
            passed = _passed(operation, given[0], graph.shapes[call.inputs[0]])
        elif type(operation) is keras.layers.Flatten:
            passed = _flattened(operation, given[0], graph.shapes[call.inputs[0]])
        elif type(operation) is keras.layers.Concatenate:
            passed = _concatenated(operation, given, [graph.shapes[tensor] for tensor in call.inputs])
        else:
            passed = None
        if passed is not None:
            return [passed]
        reason = self.why_not(operation, given[0], call.inputs[0], graph)
        if reason is None:
            self.compensations.append(Compensation(operation, path, given[0]))
        else:
            self.lose(rescaled, path, reason)
        return rescalings

    def source(self, decision, shape):
        def values():
            layer = self.layer_of(decision.layer)
            mean, variance = (ops.convert_to_numpy(x) for x in layer.activation_moments())
            return np.sqrt(variance + layer.proxy_epsilon), mean

        return Rescaling(channel_axis(decision.layer) % len(shape), (decision.path,), values)

    def why_not(self, operation, rescaling, tensor, graph):
        """Why the weights of `operation` cannot take back `rescaling`; None if they can."""
        kind = type(operation).__name__
        rank = len(graph.shapes[tensor])
        if type(operation) in (keras.layers.Dense, *CONVOLUTIONS, *DEPTHWISE, *SEPARABLE):
            axis = _channel_axis(operation, rank)
            padding = getattr(operation, "padding", "valid")
            if padding != "valid" and set(operation.kernel_size) != {1}:
                return f"{kind} with padding='{padding}', which has zeros where the offset would have to be"
        elif isinstance(operation, NORMALIZATIONS):
            return f"{kind}, whose statistics it changes"
        elif nested_model(operation) is not None:
            return "nested model, into which it is not followed"
        elif kind.startswith("ZeroPadding"):
            return f"{kind}, which has zeros where the offset would have to be"
        else:
            return f"{kind}, which does not take it back or pass it on"
        if rescaling is None or rescaling.axis != axis:
            return f"{kind} along another axis than that of the channels"
        if self.plan.calls[id(operation)] > 1:
            return f"{kind} that is called more than once"
        # Quantized layers, and those with low-rank adapters, whose kernels are not what is stored.
        if any(not keras.backend.is_float_dtype(weight.dtype) for weight in operation.weights) or getattr(
            operation, "lora_enabled", False
        ):
            return f"{kind} whose kernel is quantized or adapted"
        return None


def _channel_axis(layer, rank):
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def _passed(layer, rescaling, shape):
    if isinstance(layer, (keras.layers.Dropout, keras.layers.Identity)):
        return rescaling
    if rescaling.axis != _channel_axis(layer, len(shape)):
        return None
    if type(layer).__name__.startswith("Global") and not layer.keepdims:
        return rescaling._replace(axis=1)
    return rescaling


def _flattened(layer, rescaling, shape):
    positions = [size for axis, size in enumerate(shape[1:], start=1) if axis != rescaling.axis]
    if None in positions or rescaling.axis != _channel_axis(layer, len(shape)):
        return None
    count = math.prod(positions)

    def values():
        # Also for channels_first, because keras.layers.Flatten moves the channels to the back first.
        scale, shift = rescaling.values()
        return np.tile(scale, count), np.tile(shift, count)

    return Rescaling(1, rescaling.sources, values)


def _concatenated(layer, given, shapes):
    axis = layer.axis % len(shapes[0])
    if any(rescaling is not None and rescaling.axis != axis for rescaling in given):
        return None

    def values():
        parts = [
            (np.ones(shape[axis]), np.zeros(shape[axis])) if rescaling is None else rescaling.values()
            for rescaling, shape in zip(given, shapes, strict=True)
        ]
        scales, shifts = zip(*parts, strict=True)
        return np.concatenate(scales), np.concatenate(shifts)

    sources = tuple(source for rescaling in given if rescaling is not None for source in rescaling.sources)
    return Rescaling(axis, sources, values)
