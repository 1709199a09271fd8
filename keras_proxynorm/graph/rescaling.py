"""Follows a scale and an offset of each channel through a model, to the linear layers that can absorb them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_proxynorm.graph.layer_kinds import (
    CONVOLUTIONS,
    LINEAR,
    NORMALIZATIONS,
    TRANSPOSED,
    data_axis,
    has_activation,
    pads_with_zeros,
    passes_affine,
)
from keras_proxynorm.graph.linear_weights import fixed_weights_reason
from keras_proxynorm.graph.reading import Call, Graph, as_path, count_calls, nested_model

__all__ = ["Absorption", "Followed", "GatedOffset", "Obstacle", "Rescaling", "follow_rescalings"]


class Rescaling(NamedTuple):
    """What the values of a tensor of the new model meant in the old one: ``scale * value + offset`` for each channel.

    Attributes:
        axis: The channel axis.
        sources: The paths of the normalizations that it comes from.
        has_offset: Whether there is an offset, or a positive scale alone.
        values: Computes scale and offset, two NumPy vectors.
    """

    axis: int
    sources: tuple[str, ...]
    has_offset: bool
    values: Callable[[], tuple[np.ndarray, np.ndarray]]

    def without_offset(self) -> "Rescaling":
        def values():
            scale, offset = self.values()
            return scale, np.zeros_like(offset)

        return self._replace(has_offset=False, values=values)


@dataclass(frozen=True, eq=False)
class Absorption:
    """A layer whose weights can absorb a rescaling of its input.

    Attributes:
        layer: The layer of the old model.
        path: Its name, preceded by the names of the models that it is nested in.
        rescaling: That of its input.
    """

    layer: Any
    path: str
    rescaling: Rescaling


@dataclass(frozen=True, eq=False)
class GatedOffset:
    """An offset before a product with a gate, ``gate * (x + offset)``, that a linear layer reads.

    The layer computes the same of ``gate * x`` if what it makes of ``gate * offset`` is added to its output: a linear
    function of the gate, which has no positions.

    Attributes:
        layer: The linear layer, with kernels of size 1.
        gate: The gate, a tensor of the old model.
        rescaling: That of the other input of the product.
    """

    layer: Any
    gate: keras.KerasTensor
    rescaling: Rescaling


class Obstacle(NamedTuple):
    """A place where a rescaling is neither absorbed nor passed on.

    Attributes:
        path: The layer or the output.
        reason: Why not.
        sources: The paths of the normalizations that the rescaling comes from.
    """

    path: str
    reason: str
    sources: tuple[str, ...]


class Followed(NamedTuple):
    """Where rescalings lead: to layers that absorb them, through gates, and to obstacles."""

    absorptions: list[Absorption]
    gated: list[GatedOffset]
    obstacles: list[Obstacle]


def follow_rescalings(
    graphs: Sequence[Graph],
    source: Callable[[Graph, Call], Rescaling | None],
    *,
    through_gates: bool = False,
    approximate: bool = False,
) -> Followed:
    """Follows the rescaled outputs of some calls to the linear layers that read them.

    Args:
        graphs: From `read_graphs`.
        source: The rescaling that begins with a call, in place of any that its inputs have; None for most.
        through_gates: Whether offsets are followed through the gates of squeeze-and-excite blocks, too.
        approximate: If True, offsets are also followed through zero padding, where they are off at the border, and
            scales through gates, where the offset is lost.

    Returns:
        The layers that can absorb a rescaling, exactly unless `approximate`; the offsets that pass through gates; and
        the places where neither is possible.
    """
    return _Search(graphs, source, through_gates, approximate).run()


class _Search:
    def __init__(self, graphs, source, through_gates, approximate):
        self.graphs: Mapping[int, Graph] = {id(graph.model): graph for graph in graphs}
        self.outermost = graphs[0]
        self.calls = count_calls(graphs)
        self.source = source
        self.through_gates = through_gates
        self.approximate = approximate
        self.results: dict[int, list] = {}
        self.found = Followed([], [], [])

    def run(self):
        graph = self.outermost
        for tensor, rescaling in zip(graph.outputs, self.outputs(graph), strict=True):
            if rescaling is not None:
                self.stop([rescaling], as_path(graph, graph.operation(tensor)), "it is an output of the model")
        return self.found

    def stop(self, rescalings, path, reason):
        sources = tuple(source for rescaling in rescalings for source in rescaling.sources)
        self.found.obstacles.append(Obstacle(path, reason, sources))

    def outputs(self, graph: Graph):
        """The rescaling of each output of `graph`, or None."""
        if id(graph.model) not in self.results:
            rescalings: dict[keras.KerasTensor, Rescaling | None] = {}
            for call in graph.calls:
                given = [rescalings.get(tensor) for tensor in call.inputs]
                after = self.after(graph, call, given)
                rescalings.update(zip(call.outputs, after, strict=False))
            self.results[id(graph.model)] = [rescalings.get(tensor) for tensor in graph.outputs]
        return self.results[id(graph.model)]

    def after(self, graph, call, given):
        """The rescalings of the outputs of `call`, from those of its inputs."""
        operation, path = call.operation, as_path(graph, call.operation)
        rescaled = [rescaling for rescaling in given if rescaling is not None]
        begun = self.source(graph, call)
        if begun is not None:
            if rescaled:
                self.stop(rescaled, path, f"{type(operation).__name__}, whose statistics it changes")
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
        reason = self.obstacle(operation, given[0], call)
        if reason is None:
            self.found.absorptions.append(Absorption(operation, path, given[0]))
        else:
            self.stop(rescaled, path, reason)
        return rescalings

    def passed(self, graph, call, given):
        """The rescaling of the output of `call`, if it passes those of its inputs on; else None."""
        operation, shapes = call.operation, [tensor.shape for tensor in call.inputs]
        passed = _passed(operation, self.without_gated(graph, call, given), shapes)
        if passed is None and self.approximate:
            if pads_with_zeros(operation):
                return _through(operation, given[0], shapes[0])
            if type(operation) is keras.layers.Multiply:
                return _multiplied(operation, [x and x.without_offset() for x in given], shapes)
        return passed

    def without_gated(self, graph, call, given):
        """The rescalings of the inputs of `call`, without an offset that its consumer can make up for."""
        if not self.through_gates or type(call.operation) is not keras.layers.Multiply or len(given) != 2:
            return given
        with_offset = [index for index, rescaling in enumerate(given) if rescaling is not None and rescaling.has_offset]
        if len(with_offset) != 1 or given[1 - with_offset[0]] is not None or not graph.is_read_once(call.output):
            return given
        (index,), (consumer,) = with_offset, graph.consumers(call.output)
        if graph.is_output(consumer.output):
            return given  # its name is that of the layer
        gate, rescaling, layer = call.inputs[1 - index], given[index], consumer.operation
        positions = {size for axis, size in enumerate(gate.shape[1:], start=1) if axis != rescaling.axis}
        scaled = rescaling.without_offset()
        if (
            type(layer) not in CONVOLUTIONS
            or set(layer.kernel_size) != {1}
            or layer.groups > 1
            or positions != {1}
            or has_activation(layer)
            or self.calls[call.operation] > 1
            or self.obstacle(layer, scaled, consumer) is not None
        ):
            return given
        self.found.gated.append(GatedOffset(layer, gate, rescaling))
        return [scaled if i == index else None for i in range(2)]

    def obstacle(self, operation, rescaling, call):
        """Why the weights of `operation` cannot absorb `rescaling`; None if they can."""
        kind = type(operation).__name__
        if type(operation) in LINEAR:
            axis = data_axis(operation, len(call.inputs[0].shape))
            padding = getattr(operation, "padding", "valid")
            has_offset = (rescaling is None or rescaling.has_offset) and not self.approximate
            if has_offset and type(operation) in TRANSPOSED:
                return f"{kind}, in which fewer positions meet at the border"
            if has_offset and padding != "valid" and set(operation.kernel_size) != {1}:
                return f"{kind} with padding='{padding}', which has zeros where the offset would have to be"
        elif isinstance(operation, NORMALIZATIONS):
            return f"{kind}, whose statistics it changes"
        elif nested_model(operation) is not None:
            return "nested model, into which it is not followed"
        elif pads_with_zeros(operation):
            return f"{kind}, which has zeros where the offset would have to be"
        else:
            return f"{kind}, which neither absorbs it nor passes it on"
        if rescaling is None or rescaling.axis != axis:
            return f"{kind} along another axis than that of the channels"
        if len(call.inputs) > 1:
            return f"{kind} that reads further tensors"
        if self.calls[operation] > 1:
            return f"{kind} that is called more than once"
        return fixed_weights_reason(operation)


def _passed(operation, given, shapes):
    """The rescaling of the output of an operation that passes those of its inputs on; None if it does not."""
    if passes_affine(operation) or (pads_with_zeros(operation) and not given[0].has_offset):
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
        scale, offset = rescaling.values()
        return np.tile(scale, count), np.tile(offset, count)

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
        scales, offsets = zip(*parts, strict=True)
        return np.concatenate(scales), np.concatenate(offsets)

    rescaled = [rescaling for rescaling in given if rescaling is not None]
    sources = tuple(source for rescaling in rescaled for source in rescaling.sources)
    return Rescaling(axis, sources, any(rescaling.has_offset for rescaling in rescaled), values)


def _multiplied(layer, given, shapes):
    rescaled = [rescaling for rescaling in given if rescaling is not None]
    axes = {rescaling.axis for rescaling in rescaled}
    if len(axes) > 1 or any(rescaling.has_offset for rescaling in rescaled):
        return None
    (axis,) = axes
    if len({len(shape) for shape in shapes}) > 1 or len({shape[axis] for shape in shapes}) > 1:
        return None

    def values():
        scales, offsets = zip(*(rescaling.values() for rescaling in rescaled), strict=True)
        return math.prod(scales), offsets[0]

    return Rescaling(axis, tuple(source for rescaling in rescaled for source in rescaling.sources), False, values)


# The classes themselves: a subclass may do more.
_PASSES = {
    keras.layers.Concatenate: _concatenated,
    keras.layers.Flatten: _flattened,
    keras.layers.Multiply: _multiplied,
    keras.layers.Reshape: _reshaped,
}
