"""Undoes in the layers behind it what proxy normalization does to the scale and the offset of an activation."""

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_proxynorm.graph.linear_weights import LinearWeights
from keras_proxynorm.graph.rescaling import Absorption
from keras_proxynorm.graph.rescaling import Rescaling
from keras_proxynorm.graph.rescaling import follow_rescalings
from keras_proxynorm.surgery.planning import Plan
from keras_proxynorm.surgery.planning import channel_axis
from keras_proxynorm.surgery.report import Uncompensated

__all__ = ["compensate_in", "find_compensations"]


def find_compensations(
    plan: Plan, layer_of: Callable[[keras.layers.Layer], keras.layers.Layer], approximate: bool = False
) -> tuple[list[Absorption], list[Uncompensated]]:
    """Follows the output of each layer with proxy normalization to the linear layers that read it.

    Args:
        plan: From `make_plan`.
        layer_of: The layer with the activation that replaces a normalization layer. It is asked for when values are
            computed, not before.
        approximate: As for `follow_rescalings`.

    Returns:
        The layers that can take the rescaling back, exactly unless `approximate`, and the places where that is not
        possible.
    """

    def source(graph, call):
        decision = plan.absorbing(graph, call)
        if decision is None:
            return None

        def values():
            layer = layer_of(decision.layer)
            mean, variance = (ops.convert_to_numpy(x) for x in layer.activation_moments())
            return np.sqrt(variance + layer.proxy_epsilon), mean

        axis = channel_axis(decision.layer) % len(graph.shapes[call.inputs[0]])
        return Rescaling(axis, (decision.path,), True, values)

    compensations, losses = follow_rescalings(list(plan.graphs), plan.calls, source, approximate=approximate)
    return compensations, [Uncompensated(*loss) for loss in losses]


def compensate_in(layer: keras.layers.Layer, compensation: Absorption):
    """Changes the kernel and the bias of `layer`, the clone of that of `compensation`."""
    weights = LinearWeights(layer)
    weights.take_in(*compensation.rescaling.values())
    weights.assign(layer)
