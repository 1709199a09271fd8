"""Decides what becomes of each normalization of a model when it is folded, before anything is built."""

import collections
import dataclasses
from collections.abc import Iterator

import keras
import numpy as np

from keras_proxynorm import baselines
from keras_proxynorm.baselines.kernel_normalization import KernelNormalization
from keras_proxynorm.graph.layer_kinds import CONVOLUTIONS
from keras_proxynorm.graph.layer_kinds import DEPTHWISE
from keras_proxynorm.graph.layer_kinds import SEPARABLE
from keras_proxynorm.graph.layer_kinds import data_axis
from keras_proxynorm.graph.linear_weights import as_float64
from keras_proxynorm.graph.linear_weights import why_weights_are_fixed
from keras_proxynorm.graph.reading import Graph
from keras_proxynorm.graph.rescaling import Absorption
from keras_proxynorm.graph.rescaling import GatedShift
from keras_proxynorm.graph.rescaling import Rescaling
from keras_proxynorm.graph.rescaling import follow_rescalings
from keras_proxynorm.layers import GroupNormProxy
from keras_proxynorm.layers import LayerNormProxy
from keras_proxynorm.layers import ProxyActivation
from keras_proxynorm.moments import resolve_activation
from keras_proxynorm.surgery.planning import channel_axis

__all__ = ["FoldPlan", "Folding", "make_fold_plan"]

# Those of the baselines that look at their inputs in training only.
_AFFINE_AT_INFERENCE = (
    baselines.BatchGroupNormalization,
    baselines.GhostBatchNormalization,
    baselines.VarianceNormalization,
)
SHIFTED, SCALED, KEPT = "scale and shift", "scale", "nothing"


@dataclasses.dataclass(frozen=True)
class Folding:
    """What becomes of one normalization.

    A layer without activation has its scale and offset at the output.

    Attributes:
        layer: The layer.
        path: Its name, behind the names of the models that it is nested in.
        groups: Number of groups that share their statistics, or None if the layer computes none at inference.
        axis: The channel axis.
        epsilon: Added to the variance.
        activation: The activation inside the layer, as Keras takes it.
        reads_mask: Whether the layer looks at masks.
        scale: NumPy vector, by which the normalized input is multiplied.
        offset: What is added in front of the activation.
        output_scale: By what its output is multiplied.
        output_offset: What is added in the end.
        linear: The layer in front whose weights take in everything, or None.
        moved: What of the output scale and offset goes into the layers behind.
    """

    layer: keras.layers.Layer
    path: str
    groups: int | None
    axis: int
    epsilon: float
    activation: object
    reads_mask: bool
    scale: np.ndarray
    offset: np.ndarray
    output_scale: np.ndarray
    output_offset: np.ndarray
    linear: keras.layers.Layer | None = None
    moved: str = KEPT

    @property
    def is_linear(self) -> bool:
        """Whether there is no activation, so that all it multiplies with and adds is at its output."""
        return resolve_activation(self.activation).is_identity

    @property
    def vanishes(self) -> bool:
        return self.linear is not None or (self.groups is None and not self.constants)

    @property
    def constants(self) -> dict[str, np.ndarray]:
        """The vectors that stay in the layer, without those that change nothing."""
        output_scale, output_offset = self.output_scale, self.output_offset
        if self.moved == SCALED:
            output_offset = output_offset / output_scale
        vectors = {
            "scale": self.scale,
            "offset": self.offset,
            "output_scale": output_scale if self.moved == KEPT else np.ones_like(output_scale),
            "output_offset": np.zeros_like(output_offset) if self.moved == SHIFTED else output_offset,
        }
        if self.is_linear:
            vectors = {"scale": vectors["output_scale"], "offset": vectors["output_offset"]}
        return {name: vector for name, vector in vectors.items() if np.any(vector != name.endswith("scale"))}

    def describe(self) -> str:
        """What became of it, in a few words."""
        if self.linear is not None:
            return f"{type(self.layer).__name__} into the layer in front of it"
        if self.vanishes:
            return f"{type(self.layer).__name__} into the layers behind it"
        return f"{type(self.layer).__name__} to constants, {self.moved} into the layers behind it"


@dataclasses.dataclass(frozen=True)
class FoldPlan:
    """What becomes of a model.

    Attributes:
        foldings: By the `id` of the normalization layer.
        absorptions: The layers that take in what is behind normalizations.
        gated: By the `id` of the layer that reads the product: the shifts for which something is added to its output.
        linear: The paths of layers that become the linear layer inside of them, by their `id`.
    """

    foldings: dict[int, Folding]
    absorptions: tuple[Absorption, ...]
    gated: dict[int, GatedShift]
    linear: dict[int, str]

    @property
    def changed(self) -> dict[int, keras.layers.Layer]:
        """The linear layers whose weights change, by their `id`."""
        behind = [absorption.layer for absorption in self.absorptions]
        in_front = [folding.linear for folding in self.foldings.values() if folding.linear is not None]
        return {id(layer): layer for layer in (*behind, *in_front)}


def make_fold_plan(graphs: list[Graph], through_gates: bool) -> FoldPlan:
    """Decides about every normalization in `graphs`.

    Args:
        graphs: From `read_graphs`.
        through_gates: Whether shifts are followed through the gates of squeeze-and-excite blocks.
    """
    calls = collections.Counter(id(call.operation) for graph in graphs for call in graph.calls)
    foldings = {folding.path: folding for folding in _foldings(graphs, calls)}
    # Everything is moved on at first, and then less where it does not arrive, until all that is moved arrives.
    for path, folding in foldings.items():
        has_rescaling = np.any(folding.output_scale != 1) or np.any(folding.output_offset != 0)
        # A negative scale would turn the maximum of a pooling into the minimum.
        if calls[id(folding.layer)] == 1 and has_rescaling and np.all(folding.output_scale > 0):
            foldings[path] = dataclasses.replace(folding, moved=SHIFTED)
    while True:
        plan, lost = _try(graphs, calls, foldings, through_gates)
        if not lost:
            return plan
        for path in lost:
            folding = foldings[path]
            can_scale = folding.moved == SHIFTED and not folding.is_linear and np.any(folding.output_scale != 1)
            foldings[path] = dataclasses.replace(folding, moved=SCALED if can_scale else KEPT)


def _try(graphs, calls, foldings, through_gates):
    """The plan by which all that `foldings` want to move is moved, and the paths of those with which it is not."""
    by_layer = {id(folding.layer): folding for folding in foldings.values()}
    gated: list[GatedShift] = []
    absorptions, losses = follow_rescalings(
        graphs, calls, lambda graph, call: _begun(by_layer, graph, call), gated if through_gates else None
    )
    linear = {
        id(call.operation): graph.path + call.operation.name
        for graph in graphs
        for call in graph.calls
        if isinstance(call.operation, KernelNormalization) and call.operation.inference_linear() is not None
    }
    plan = FoldPlan(by_layer, tuple(absorptions), {id(shift.layer): shift for shift in gated}, linear)
    return plan, {source for loss in losses for source in loss.sources}


def _begun(foldings, graph, call):
    folding = foldings.get(id(call.operation))
    if folding is None or folding.moved == KEPT:
        return None
    has_shift = folding.moved == SHIFTED
    shift = folding.output_offset if has_shift else np.zeros_like(folding.output_offset)
    axis = folding.axis % len(graph.shapes[call.inputs[0]])
    return Rescaling(axis, (folding.path,), has_shift, lambda: (folding.output_scale, shift))


def _foldings(graphs, calls) -> Iterator[Folding]:
    seen = set()
    for graph in graphs:
        for call in graph.calls:
            layer = call.operation
            if id(layer) in seen or not _is_foldable(layer):
                continue
            seen.add(id(layer))
            folding = _folding(layer, graph.path + layer.name)
            if type(layer) in (keras.layers.BatchNormalization, *_AFFINE_AT_INFERENCE) and calls[id(layer)] == 1:
                folding = _into_layer_in_front(folding, graph, call, calls)
            yield folding


def _is_foldable(operation):
    # The classes themselves: what a subclass does, nobody knows.
    if type(operation) in (keras.layers.BatchNormalization, keras.layers.GroupNormalization):
        return not isinstance(operation.axis, (list, tuple)) or len(operation.axis) == 1
    if type(operation) in _AFFINE_AT_INFERENCE:
        return operation.inference_affine() is not None
    return type(operation) in (GroupNormProxy, LayerNormProxy, ProxyActivation)


def _folding(layer, path):
    activation, groups, epsilon = None, getattr(layer, "groups", None), getattr(layer, "epsilon", 0.0)
    if type(layer) in _AFFINE_AT_INFERENCE:
        groups, epsilon = None, 0.0
        output_scale, output_offset = layer.inference_affine()
        scale, offset = np.ones_like(output_scale), np.zeros_like(output_offset)
    elif isinstance(layer, keras.layers.BatchNormalization):
        scale, offset = _affine(layer, layer.moving_mean.shape[0])
        output_scale = scale / np.sqrt(as_float64(layer.moving_variance) + epsilon)
        output_offset = offset - as_float64(layer.moving_mean) * output_scale
        scale, offset, epsilon = np.ones_like(scale), np.zeros_like(offset), 0.0
    elif isinstance(layer, keras.layers.GroupNormalization):
        output_scale, output_offset = _affine(layer, layer.input_spec.axes[channel_axis(layer)])
        scale, offset = np.ones_like(output_scale), np.zeros_like(output_offset)
    else:
        activation = layer.activation
        scale, offset, output_scale, output_offset = layer.inference_constants()
        elementwise = resolve_activation(activation)
        if elementwise.is_identity:
            scale, offset, output_scale, output_offset = output_scale, output_offset, scale, offset
        elif elementwise.is_homogeneous:
            scale, offset, output_scale = scale * output_scale, offset * output_scale, np.ones_like(scale)
    return Folding(
        layer=layer,
        path=path,
        groups=len(scale) if groups == -1 else groups,
        axis=channel_axis(layer),
        epsilon=epsilon,
        activation=activation,
        reads_mask=type(layer) is not keras.layers.GroupNormalization,
        scale=scale,
        offset=offset,
        output_scale=output_scale,
        output_offset=output_offset,
    )


def _affine(layer, count):
    gamma = as_float64(layer.gamma) if layer.scale else np.ones(count)
    return gamma, (as_float64(layer.beta) if layer.center else np.zeros(count))


def _into_layer_in_front(folding, graph, call, calls):
    """`folding`, in the linear layer that makes the input if nothing else reads that."""
    # A mask would be another one.
    tensor = call.inputs[0]
    linear = graph.operation(tensor)
    if (
        type(linear) in (keras.layers.Dense, *CONVOLUTIONS, *DEPTHWISE, *SEPARABLE)
        and linear.activation is keras.activations.linear
        and calls[id(linear)] == 1
        and len(graph.consumers(tensor)) == 1
        and tensor not in graph.outputs
        and why_weights_are_fixed(linear) is None
        and folding.axis % len(graph.shapes[tensor]) == data_axis(linear, len(graph.shapes[tensor]))
    ):
        ones, zeros = np.ones_like(folding.scale), np.zeros_like(folding.scale)
        return dataclasses.replace(
            folding,
            linear=linear,
            scale=folding.output_scale,
            offset=folding.output_offset,
            output_scale=ones,
            output_offset=zeros,
        )
    return folding
