"""Decides what becomes of each normalization of a model when it is folded, before anything is built."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_proxynorm import baselines
from keras_proxynorm.baselines.kernel_normalization import KernelNormalization
from keras_proxynorm.graph.layer_kinds import LINEAR, data_axis, has_activation, normalization_axis, overridden_methods
from keras_proxynorm.graph.linear_weights import as_float64, fixed_weights_reason
from keras_proxynorm.graph.reading import Call, Graph, as_path, count_calls
from keras_proxynorm.graph.rescaling import Absorption, GatedOffset, Obstacle, Rescaling, follow_rescalings
from keras_proxynorm.layers import GroupNormProxy, LayerNormProxy, ProxyActivation
from keras_proxynorm.layers.base import NormalizationLayer
from keras_proxynorm.moments import resolve_activation

__all__ = ["FoldPlan", "Folding", "plan_folding"]

_PROXY_LAYERS = (GroupNormProxy, LayerNormProxy, ProxyActivation)
_FOLDABLE = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    *_PROXY_LAYERS,
    baselines.BatchGroupNormalization,
    baselines.GhostBatchNormalization,
    baselines.VarianceNormalization,
)
_WITH_LINEAR = (
    baselines.ConvolutionalNormalization,
    baselines.CrossIterationBatchNormalization,
    baselines.WeightNormalization,
    baselines.WeightStandardization,
)
# What a normalization moves into the layers that follow.
BOTH, SCALE, NOTHING = "scale and offset", "scale", "nothing"


@dataclasses.dataclass(frozen=True, eq=False)
class Folding:
    """What becomes of one normalization.

    A layer without activation has its scale and offset at the output.

    Attributes:
        layer: The layer.
        path: Its name, preceded by the names of the models that it is nested in.
        groups: Number of groups that share their statistics, or None if the layer computes none at inference.
        axis: The channel axis.
        epsilon: Added to the variance.
        activation: The activation inside the layer, as Keras takes it.
        reads_mask: Whether the layer looks at masks.
        scale: NumPy vector, by which the normalized input is multiplied.
        offset: What is added before the activation.
        output_scale: By what its output is multiplied.
        output_offset: What is added in the end.
        linear: The preceding layer whose weights absorb everything, or None.
        moved: What of the output scale and offset the following layers absorb.
        obstacle: Why they do not absorb the rest, or None.
    """

    layer: Any
    path: str
    groups: int | None
    axis: int
    epsilon: float
    activation: Any
    reads_mask: bool
    scale: np.ndarray
    offset: np.ndarray
    output_scale: np.ndarray
    output_offset: np.ndarray
    linear: Any = None
    moved: str = NOTHING
    obstacle: str | None = None

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
        if self.moved == SCALE:
            output_offset = output_offset / output_scale
        vectors = {
            "scale": self.scale,
            "offset": self.offset,
            "output_scale": output_scale if self.moved == NOTHING else np.ones_like(output_scale),
            "output_offset": np.zeros_like(output_offset) if self.moved == BOTH else output_offset,
        }
        if self.is_linear:
            vectors = {"scale": vectors["output_scale"], "offset": vectors["output_offset"]}
        return {name: vector for name, vector in vectors.items() if np.any(vector != name.endswith("scale"))}

    @property
    def action(self) -> str:
        """What became of it, in a few words."""
        if self.linear is not None:
            return "into the preceding layer"
        if self.vanishes:
            return "dropped, since it changes nothing" if self.moved == NOTHING else "into the following layers"
        return "to constants" if self.moved == NOTHING else f"to constants, {self.moved} into the following layers"


@dataclasses.dataclass(frozen=True)
class FoldPlan:
    """What becomes of a model.

    Attributes:
        foldings: What becomes of normalizations, by the layer.
        absorptions: The layers that absorb what normalizations move.
        gated: By the layer that reads the product: the offsets for which something is added to its output.
        contained: Layers that become the linear layer inside of them, with their paths.
        reasons: Why other normalizations are left alone, by the layer: its path and the reason.
    """

    foldings: Mapping[keras.Operation, Folding]
    absorptions: Sequence[Absorption]
    gated: Mapping[keras.Operation, GatedOffset]
    contained: Mapping[keras.Operation, str]
    reasons: Mapping[keras.Operation, tuple[str, str]]


def plan_folding(graphs: Sequence[Graph], through_gates: bool) -> FoldPlan:
    """Decides about every normalization in `graphs`.

    Args:
        graphs: From `read_graphs`.
        through_gates: Whether offsets are followed through the gates of squeeze-and-excite blocks.
    """
    uses: dict[keras.Operation, list[tuple[Graph, Call]]] = {}
    for graph in graphs:
        for call in graph.calls:
            if isinstance(call.operation, (*_FOLDABLE, NormalizationLayer, keras.layers.LayerNormalization)):
                uses.setdefault(call.operation, []).append((graph, call))
    foldings: dict[keras.Operation, Folding] = {}
    contained, reasons = {}, {}
    counts = count_calls(graphs)
    for layer, used in uses.items():
        path, reason = as_path(used[0][0], layer), _reason_to_leave(layer)
        if reason is not None:
            reasons[layer] = path, reason
        elif isinstance(layer, KernelNormalization):
            contained[layer] = path
        else:
            foldings[layer] = _into_preceding_layer(_folding(layer, path), used, counts)
    moved, absorptions, gated = _move(graphs, foldings, counts, through_gates)
    return FoldPlan(moved, absorptions, gated, contained, reasons)


def _move(graphs, foldings, counts, through_gates):
    """Starts by moving every scale and offset to the layers that follow, and retracts those that meet an obstacle.

    Returns:
        The foldings with what each of them moves; the absorptions; and the offsets that pass through gates.
    """
    moved = {layer: _moving(folding, counts) for layer, folding in foldings.items()}
    while True:
        found = follow_rescalings(graphs, functools.partial(_begun, moved), through_gates=through_gates)
        if not found.obstacles:
            return moved, found.absorptions, {gated.layer: gated for gated in found.gated}
        moved = {layer: _retracted(folding, found.obstacles) for layer, folding in moved.items()}


def _moving(folding, counts):
    """`folding`, which moves all that it may."""
    if not np.any(folding.output_scale != 1) and not np.any(folding.output_offset != 0):
        return folding
    if counts[folding.layer] > 1:
        return dataclasses.replace(folding, obstacle="it is called several times")
    if not np.all(folding.output_scale > 0):
        # They would turn the maximum of a pooling into the minimum.
        return dataclasses.replace(folding, obstacle="some of its scales are not positive")
    return dataclasses.replace(folding, moved=BOTH)


def _retracted(folding: Folding, obstacles: Sequence[Obstacle]) -> Folding:
    """`folding`, which moves less if what it moves meets one of `obstacles`."""
    met = next((obstacle for obstacle in obstacles if folding.path in obstacle.sources), None)
    if met is None:
        return folding
    can_scale = folding.moved == BOTH and not folding.is_linear and np.any(folding.output_scale != 1)
    moved = SCALE if can_scale else NOTHING
    return dataclasses.replace(folding, moved=moved, obstacle=folding.obstacle or met.reason)


def _begun(foldings, graph, call):
    folding = foldings.get(call.operation)
    if folding is None or folding.moved == NOTHING:
        return None
    has_offset = folding.moved == BOTH
    offset = folding.output_offset if has_offset else np.zeros_like(folding.output_offset)
    axis = folding.axis % len(call.inputs[0].shape)
    return Rescaling(axis, (folding.path,), has_offset, lambda: (folding.output_scale, offset))


def _reason_to_leave(layer):
    """Why a normalization stays what it is; None if it is folded."""
    known = (*_FOLDABLE, *_WITH_LINEAR)
    if not isinstance(layer, known):
        return f"a {type(layer).__name__}, which looks at its inputs in a way of its own"
    methods = overridden_methods(layer, known)
    if methods:
        return f"a subclass that overrides {', '.join(methods)}, so that it may compute something else"
    if normalization_axis(layer) is None:
        return f"its gamma and beta differ between positions: axis={layer.axis}"
    if isinstance(layer, KernelNormalization):
        return None if layer.inference_linear() is not None else "at inference it is no linear layer with constants"
    if hasattr(layer, "inference_affine") and layer.inference_affine() is None:
        return "its statistics depend on its input at inference"
    return None


def _folding(layer, path):
    activation, groups, epsilon = None, getattr(layer, "groups", None), getattr(layer, "epsilon", 0.0)
    if isinstance(layer, _PROXY_LAYERS):
        activation = layer.activation
        scale, offset, output_scale, output_offset = layer.inference_constants()
        elementwise = resolve_activation(activation)
        if elementwise.is_identity:
            scale, offset, output_scale, output_offset = output_scale, output_offset, scale, offset
        elif elementwise.is_homogeneous:
            scale, offset, output_scale = scale * output_scale, offset * output_scale, np.ones_like(scale)
    else:
        if isinstance(layer, keras.layers.GroupNormalization):
            output_scale, output_offset = _affine(layer, layer.input_spec.axes[normalization_axis(layer)])
        else:
            groups, epsilon = None, 0.0
            output_scale, output_offset = _affine_at_inference(layer)
        scale, offset = np.ones_like(output_scale), np.zeros_like(output_offset)
    return Folding(
        layer=layer,
        path=path,
        groups=len(scale) if groups == -1 else groups,
        axis=normalization_axis(layer),
        epsilon=epsilon,
        activation=activation,
        reads_mask=not isinstance(layer, keras.layers.GroupNormalization),
        scale=scale,
        offset=offset,
        output_scale=output_scale,
        output_offset=output_offset,
    )


def _affine_at_inference(layer):
    """Scale and offset of a normalization by moving statistics."""
    if not isinstance(layer, keras.layers.BatchNormalization):
        return layer.inference_affine()
    scale, offset = _affine(layer, layer.moving_mean.shape[0])
    scale = scale / np.sqrt(as_float64(layer.moving_variance) + layer.epsilon)
    return scale, offset - as_float64(layer.moving_mean) * scale


def _affine(layer, count):
    gamma = as_float64(layer.gamma) if layer.scale else np.ones(count)
    return gamma, (as_float64(layer.beta) if layer.center else np.zeros(count))


def _into_preceding_layer(folding, used, counts):
    """`folding`, absorbed by the linear layer that makes its input if nothing else reads that."""
    graph, call = used[0]
    tensor = call.inputs[0]
    linear: Any = graph.operation(tensor)
    rank = len(tensor.shape)
    if (
        folding.groups is not None
        or isinstance(folding.layer, ProxyActivation)
        or type(linear) not in LINEAR
        or has_activation(linear)
        or counts[linear] > 1
        or counts[folding.layer] > 1
        or not graph.is_read_once(tensor)
        or fixed_weights_reason(linear) is not None
        or folding.axis % rank != data_axis(linear, rank)
    ):
        return folding
    return dataclasses.replace(
        folding,
        linear=linear,
        scale=folding.output_scale,
        offset=folding.output_offset,
        output_scale=np.ones_like(folding.scale),
        output_offset=np.zeros_like(folding.scale),
    )
