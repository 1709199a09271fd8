"""What a user must hear about a replacement: what did not come through, and what is not as it may seem."""

import collections
from collections.abc import Iterator, Sequence

import keras

from keras_proxynorm.compat import layers_inside
from keras_proxynorm.graph.reading import Graph, as_path, nested_model
from keras_proxynorm.surgery.planning import Decision, hidden_normalizations
from keras_proxynorm.surgery.targets import Target

__all__ = ["notes_about_plan"]


def notes_about_plan(
    model: keras.Model, graphs: Sequence[Graph], decisions: Sequence[Decision], target: Target
) -> list[str]:
    """The notes about a plan, one sentence or a few each."""
    return [
        *_not_reached(graphs, decisions),
        *_left_alone(decisions),
        *_activation_before(decisions, target),
        *_shared_inside(graphs),
        *_frozen_with(decisions),
        *_nothing_replaced(model, decisions),
    ]


def _not_reached(graphs, decisions) -> Iterator[str]:
    hidden = hidden_normalizations(graphs)
    if hidden:
        count, total = sum(hidden.values()), sum(hidden.values()) + len(decisions)
        yield (
            f"{count} of {total} normalizations were not reached and are as they were, because they are inside layers, "
            f"where the graph of the model does not lead: {listed(hidden)}. A functional model in the place of such a "
            "layer is reached, also inside a TimeDistributed."
        )


def _left_alone(decisions) -> Iterator[str]:
    """What was asked for and is left alone, because it is not understood or because it would not do."""
    left = [decision for decision in decisions if not decision.is_replaced and decision.is_selected]
    if left:
        reasons = [f"'{decision.path}' ({decision.reason})" for decision in left]
        more = f"; and {len(reasons) - 3} more, see the report" if len(reasons) > 3 else ""
        yield f"Left alone: {len(left)} of {len(decisions)} normalizations: {'; '.join(reasons[:3])}{more}."


def _activation_before(decisions, target) -> Iterator[str]:
    paths = [decision.path for decision in decisions if decision.follows_activation]
    if paths:
        without = "" if any(x.activated is not None for x in decisions) else f", and no layer of {target.name} has one"
        yield (
            f"{len(paths)} normalizations follow their activation, so that there is none to fuse with{without}: "
            f"{listed(paths)}. They became plain normalizations. In the order of the papers (convolution, "
            "normalization, activation) they would be fused: move the activations after them in the code of the model."
        )


def _shared_inside(graphs) -> Iterator[str]:
    """Layers that are part of several others: `get_config` does not know that they are the same."""
    paths: dict[int, dict[int, str]] = collections.defaultdict(dict)
    for graph in graphs:
        for operation in graph.operations:
            if isinstance(operation, keras.layers.Layer) and nested_model(operation) is None:
                for layer in layers_inside(operation):
                    paths[id(layer)][id(operation)] = as_path(graph, operation)
    for layers in paths.values():
        if len(layers) > 1:
            yield f"The layers {list(layers.values())} share weights. In the new model each has its own."


def _frozen_with(decisions) -> Iterator[str]:
    names = [
        decision.linear.name
        for decision in decisions
        if decision.linear is not None and decision.linear.trainable and not decision.layer.trainable
    ]
    if names:
        yield (
            f"The layers {names} could be trained. The layers that replace frozen normalizations absorb them, and they "
            "are frozen with these."
        )


def _nothing_replaced(model, decisions) -> Iterator[str]:
    if any(decision.is_replaced for decision in decisions):
        return
    found = "none in its graph"
    if decisions:
        kinds = ", ".join(sorted({type(decision.layer).__name__ for decision in decisions}))
        found = f"{len(decisions)} ({kinds}), which were left alone; see the report and the argument `layers`"
    yield f"No normalization layer of the model '{model.name}' was replaced. It has {found}."


def listed(paths) -> str:
    """Some paths in quotes; many are cut short."""
    paths = [repr(path) for path in paths]
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more, see the report" if len(paths) > 5 else "")
