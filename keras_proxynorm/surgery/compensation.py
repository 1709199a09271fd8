"""Undoes in the layers that follow what proxy normalization does to the scale and the offset of an activation."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_proxynorm.graph.carrying import carry_by_name
from keras_proxynorm.graph.layer_kinds import normalization_axis
from keras_proxynorm.graph.linear_weights import WITH_BIAS, LinearWeights
from keras_proxynorm.graph.reading import Graph
from keras_proxynorm.graph.rescaling import Absorption, Followed, Rescaling, follow_rescalings
from keras_proxynorm.graph.rewriting import Rewrite, clone_layer
from keras_proxynorm.surgery.planning import Decision

__all__ = ["compensate_in", "find_compensations", "with_bias"]


def find_compensations(graphs: Sequence[Graph], decisions: Iterable[Decision], approximate: bool) -> Followed:
    """Follows the output of each layer with proxy normalization to the linear layers that read it.

    Args:
        graphs: From `read_graphs`.
        decisions: From `plan`.
        approximate: As for `follow_rescalings`.

    Returns:
        The layers that can take the rescaling back, exactly unless `approximate`, and the places where that is not
        possible. The values of a rescaling are those of the weights at the time when they are asked for.
    """
    absorbing = {call: decision for decision in decisions for call in decision.absorbed}

    def source(graph, call):
        decision = absorbing.get(call)
        if decision is None:
            return None

        def values():
            mean, variance = (ops.convert_to_numpy(x) for x in decision.activated.activation_moments())
            return np.sqrt(variance + decision.activated.proxy_epsilon), mean

        axis = normalization_axis(decision.layer) % len(call.inputs[0].shape)
        return Rescaling(axis, (decision.path,), True, values)

    return follow_rescalings(graphs, source, approximate=approximate)


def with_bias(absorptions: Iterable[Absorption]) -> Iterator[Rewrite]:
    """What becomes of the linear layers without bias that absorb something: they get one."""
    for layer in dict.fromkeys(absorption.layer for absorption in absorptions):
        if not layer.use_bias:

            def make(layer=layer):
                return clone_layer(layer, **WITH_BIAS)

            def carry(source, new):
                carry_by_name(source, new)
                return ()

            yield Rewrite(layer, make, carry)


def compensate_in(layer: Any, absorption: Absorption) -> None:
    """Changes the kernel and the bias of `layer`, the clone of that of `absorption`."""
    weights = LinearWeights(layer)
    weights.absorb(*absorption.rescaling.values())
    weights.assign(layer)
