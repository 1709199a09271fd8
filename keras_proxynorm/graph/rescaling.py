"""Follows a scale and a shift of each channel through a model, to the linear layers whose weights can take them in."""

import graphlib
import math
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import keras
import numpy as np

from keras_proxynorm.graph.layer_kinds import CONVOLUTIONS
from keras_proxynorm.graph.layer_kinds import DEPTHWISE
from keras_proxynorm.graph.layer_kinds import NORMALIZATIONS
from keras_proxynorm.graph.layer_kinds import SEPARABLE
from keras_proxynorm.graph.layer_kinds import data_axis
from keras_proxynorm.graph.layer_kinds import pads_with_zeros
from keras_proxynorm.graph.layer_kinds import passes_affine
from keras_proxynorm.graph.linear_weights import why_weights_are_fixed
from keras_proxynorm.graph.reading import Call
from keras_proxynorm.graph.reading import Graph
from keras_proxynorm.graph.reading import nested_model

__all__ = ["Absorption", "GatedShift", "Loss", "Rescaling", "follow_rescalings"]


class Rescaling(NamedTuple):
    """What the values of a tensor of the new model meant in the old one: ``scale * value + shift`` for each channel.

    Attributes:
        axis: The channel axis.
        sources: The paths of the normalizations that it comes from.
        has_shift: Whether there is a shift, or a positive scale alone.
        values: Computes scale and shift, two NumPy vectors.
    """

    axis: int
    sources: tuple[str, ...]
    has_shift: bool
    values: Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Absorption:
    """A layer whose weights can take in a rescaling of its input.

    Attributes:
        layer: The layer of the old model.
        path: Its name, behind the names of the models that it is nested in.
        rescaling: That of its input.
    """

    layer: keras.layers.Layer
    path: str
    rescaling: Rescaling


class GatedShift(NamedTuple):
    """A shift in front of a product with a gate, ``gate * (x + shift)``, that a linear layer reads.

    The layer computes the same of ``gate * x`` if what it makes of ``gate * shift`` is added to its output: a linear
    function of the gate, which has no positions.

    Attributes:
        layer: The linear layer, with kernels of size 1.
        product: The multiplication.
        gate: The index of the gate among its inputs.
        rescaling: That of the other input.
    """

    layer: keras.layers.Layer
    product: keras.layers.Layer
    gate: int
    rescaling: Rescaling


class Loss(NamedTuple):
    """A place where a rescaling can neither be taken in nor passed on.

    Attributes:
        path: The layer or the output.
        reason: Why not.
        sources: The paths of the normalizations that the rescaling comes from.
    """

    path: str
    reason: str
    sources: tuple[str, ...]


def follow_rescalings(
    graphs: list[Graph],
    calls: Mapping[int, int],
    source: Callable[[Graph, Call], Rescaling | None],
    gated: list[GatedShift] | None = None,
    approximate: bool = False,
) -> tuple[list[Absorption], list[Loss]]:
    """Follows the rescaled outputs of some layers to the linear layers that read them.

    Args:
        graphs: From `read_graphs`.
        calls: How often an operation is called in all graphs, by its `id`.
        source: The rescaling that begins with a call, in place of any that its inputs have; None for most.
        gated: If given, shifts are followed through gates, too, and what that takes is appended to this list.
        approximate: If True, shifts are also followed through zero padding, where they are off at the border, and
            scales through gates, where the shift is lost.

    Returns:
        The layers that can take a rescaling in, exactly unless `approximate`, and the places where that is not
        possible.
    """
    return _Search(graphs, calls, source, gated, approximate).run()


class _Search:
    def __init__(self, graphs, calls, source, gated, approximate):
        self.graphs = {id(graph.model): graph for graph in graphs}
        self.outermost = graphs[0]
        self.calls = calls
        self.source = source
        self.gated = gated
        self.approximate = approximate
        self.results: dict[int, list] = {}
        self.absorptions: list[Absorption] = []
        self.losses: list[Loss] = []

    def run(self):
        graph = self.outermost
        for tensor, rescaling in zip(graph.outputs, self.outputs(graph), strict=True):
            if rescaling is not None:
                self.lose([rescaling], graph.path + tensor.operation, "it is an output of the model")
        return self.absorptions, self.losses

    def lose(self, rescalings, path, reason):
        sources = tuple(source for rescaling in rescalings for source in rescaling.sources)
        self.losses.append(Loss(path, reason, sources))

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
        rescaled = [rescaling for rescaling in given if rescaling is not None]
        begun = self.source(graph, call)
        if begun is not None:
            if rescaled:
                self.lose(rescaled, path, f"{type(operation).__name__}, whose statistics it changes")
            return [begun]
        nested = nested_model(operation)
        rescalings = [] if nested is None else self.outputs(self.graphs[id(nested)])
        if nested is not operation:  # TimeDistributed has one more axis, of time
            rescalings = [x and x._replace(axis=x.axis + 1) for x in rescalings]
        if not rescaled:
            return rescalings
        passed = self.passed(graph, call, given)
        if passed is not None:
            return [passed]
        reason = self.why_not(operation, given[0], call.inputs[0], graph)
        if reason is None:
            self.absorptions.append(Absorption(operation, path, given[0]))
        else:
            self.lose(rescaled, path, reason)
        return rescalings

    def passed(self, graph, call, given):
        """The rescaling of the output of `call`, if it passes those of its inputs on; else None."""
        operation, shapes = call.operation, self.shapes(graph, call)
        passed = _passed(operation, self.without_gated(graph, call, given), shapes)
        if passed is None and self.approximate:
            if pads_with_zeros(operation):
                return _through(operation, given[0], shapes[0])
            if type(operation) is keras.layers.Multiply:
                return _multiplied(operation, [rescaling and _without_shift(rescaling) for rescaling in given], shapes)
        return passed

    def shapes(self, graph, call):
        return [graph.shapes[tensor] for tensor in call.inputs]

    def without_gated(self, graph, call, given):
        """The rescalings of the inputs of `call`, without a shift for which its reader can make up."""
        readers = graph.consumers(call.output)
        if self.gated is None or type(call.operation) is not keras.layers.Multiply or len(given) != 2:
            return given
        shifted = [index for index, rescaling in enumerate(given) if rescaling is not None and rescaling.has_shift]
        if len(shifted) != 1 or given[1 - shifted[0]] is not None or len(readers) != 1 or call.output in graph.outputs:
            return given
        (index,), (reader,) = shifted, readers
        rescaling, shape = given[index], self.shapes(graph, call)[1 - index]
        positions = {size for axis, size in enumerate(shape[1:], start=1) if axis != rescaling.axis}
        layer, scaled = reader.operation, _without_shift(rescaling)
        if (
            type(layer) not in CONVOLUTIONS
            or set(layer.kernel_size) != {1}
            or layer.groups > 1
            or positions != {1}
            or layer.activation is not keras.activations.linear
            or self.calls[id(call.operation)] > 1
            or self.why_not(layer, scaled, call.output, graph) is not None
        ):
            return given
        self.gated.append(GatedShift(layer, call.operation, 1 - index, rescaling))
        return [scaled if i == index else None for i in range(2)]

    def why_not(self, operation, rescaling, tensor, graph):
        """Why the weights of `operation` cannot take `rescaling` in; None if they can."""
        kind = type(operation).__name__
        if type(operation) in (keras.layers.Dense, *CONVOLUTIONS, *DEPTHWISE, *SEPARABLE):
            axis = data_axis(operation, len(graph.shapes[tensor]))
            padding = getattr(operation, "padding", "valid")
            shifts = (rescaling is None or rescaling.has_shift) and not self.approximate
            if shifts and padding != "valid" and set(operation.kernel_size) != {1}:
                return f"{kind} with padding='{padding}', which has zeros where the offset would have to be"
        elif isinstance(operation, NORMALIZATIONS):
            return f"{kind}, whose statistics it changes"
        elif nested_model(operation) is not None:
            return "nested model, into which it is not followed"
        elif pads_with_zeros(operation):
            return f"{kind}, which has zeros where the offset would have to be"
        else:
            return f"{kind}, which does not take it back or pass it on"
        if rescaling is None or rescaling.axis != axis:
            return f"{kind} along another axis than that of the channels"
        if self.calls[id(operation)] > 1:
            return f"{kind} that is called more than once"
        return why_weights_are_fixed(operation)


def _without_shift(rescaling):
    def values():
        scale, shift = rescaling.values()
        return scale, np.zeros_like(shift)

    return rescaling._replace(has_shift=False, values=values)


def _passed(operation, given, shapes):
    """The rescaling of the output of an operation that passes those of its inputs on; None if it does not."""
    if passes_affine(operation) or (pads_with_zeros(operation) and not given[0].has_shift):
        return _through(operation, given[0], shapes[0])
    passes = _PASSES.get(type(operation))
    return passes and passes(operation, given, shapes)


def _through(layer, rescaling, shape):
    if isinstance(layer, (keras.layers.Dropout, keras.layers.Identity)):
        return rescaling
    if rescaling.axis != data_axis(layer, len(shape)):
        return None
    if type(layer).__name__.startswith("Global") and not layer.keepdims:
        return rescaling._replace(axis=1)
    return rescaling


def _flattened(layer, given, shapes):
    (rescaling,), (shape,) = given, shapes
    positions = [size for axis, size in enumerate(shape[1:], start=1) if axis != rescaling.axis]
    if None in positions or rescaling.axis != data_axis(layer, len(shape)):
        return None
    count = math.prod(positions)

    def values():
        # Also for channels_first, because keras.layers.Flatten moves the channels to the back first.
        scale, shift = rescaling.values()
        return np.tile(scale, count), np.tile(shift, count)

    return rescaling._replace(axis=1, values=values)


def _reshaped(layer, given, shapes):
    # Only where the last axis stays what it is, as for the one pixel of a squeeze-and-excite block.
    (rescaling,), (shape,) = given, shapes
    if rescaling.axis != len(shape) - 1 or layer.target_shape[-1] != shape[-1]:
        return None
    return rescaling._replace(axis=len(layer.target_shape))


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

    rescaled = [rescaling for rescaling in given if rescaling is not None]
    sources = tuple(source for rescaling in rescaled for source in rescaling.sources)
    return Rescaling(axis, sources, any(rescaling.has_shift for rescaling in rescaled), values)


def _multiplied(layer, given, shapes):
    rescaled = [rescaling for rescaling in given if rescaling is not None]
    axes = {rescaling.axis for rescaling in rescaled}
    if len(axes) > 1 or any(rescaling.has_shift for rescaling in rescaled):
        return None
    (axis,) = axes
    if len({len(shape) for shape in shapes}) > 1 or len({shape[axis] for shape in shapes}) > 1:
        return None

    def values():
        scales, shifts = zip(*(rescaling.values() for rescaling in rescaled), strict=True)
        return math.prod(scales), shifts[0]

    return Rescaling(axis, tuple(source for rescaling in rescaled for source in rescaling.sources), False, values)


# The classes themselves: what a subclass does, nobody knows.
_PASSES = {
    keras.layers.Concatenate: _concatenated,
    keras.layers.Flatten: _flattened,
    keras.layers.Multiply: _multiplied,
    keras.layers.Reshape: _reshaped,
}
