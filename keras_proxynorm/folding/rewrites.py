"""The rewrites that make the inference form of a model: what becomes of normalizations and the layers around them."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras

from keras_proxynorm.folding.folded_normalization import FoldedNormalization
from keras_proxynorm.folding.planning import Folding, FoldPlan
from keras_proxynorm.graph.carrying import dtype_of
from keras_proxynorm.graph.linear_weights import WITH_BIAS, LinearWeights
from keras_proxynorm.graph.reading import Graph
from keras_proxynorm.graph.rescaling import GatedOffset
from keras_proxynorm.graph.rewriting import Rewrite, clone_layer

__all__ = ["rewrites"]


def rewrites(plan: FoldPlan, graphs: Sequence[Graph]) -> Iterator[Rewrite]:
    """What becomes of the operations of a model by a plan."""
    taken = {operation.name for graph in graphs for operation in graph.operations}
    for folding in plan.foldings.values():
        yield _vanished(folding) if folding.vanishes else _constants(folding)
    for layer in plan.contained:
        yield _contained(layer)
    preceding = {folding.linear: folding for folding in plan.foldings.values() if folding.linear is not None}
    changed = dict.fromkeys([*(absorption.layer for absorption in plan.absorptions), *preceding])
    for layer in changed:
        weights = functools.partial(_changed_weights, plan, preceding.get(layer), layer)
        gated = plan.gated.get(layer)
        yield _changed(layer, weights) if gated is None else _gated(layer, weights, gated, preceding.get(layer), taken)


def _vanished(folding: Folding) -> Rewrite:
    """A normalization that the layers around it absorb whole."""
    layer = folding.layer

    def make():
        return keras.layers.Identity(name=layer.name, dtype=dtype_of(layer))

    return Rewrite(layer, make, lambda *_: ())


def _constants(folding: Folding) -> Rewrite:
    """A normalization with constants in the place of its weights."""

    def make():
        return FoldedNormalization(
            groups=folding.groups,
            axis=folding.axis,
            epsilon=folding.epsilon,
            activation=folding.activation,
            constants=list(folding.constants),
            reads_mask=folding.reads_mask,
            name=folding.layer.name,
            dtype=dtype_of(folding.layer),
        )

    def carry(_, new):
        for name, vector in folding.constants.items():
            getattr(new, name).assign(vector)
        return ()

    return Rewrite(folding.layer, make, carry)


def _contained(layer: Any) -> Rewrite:
    """A normalization that owns a linear layer, and is that layer with another kernel at inference."""
    kernel, bias, activation = layer.inference_linear()

    def make():
        config = {**WITH_BIAS, "activation": activation, "name": layer.name, "dtype": dtype_of(layer)}
        return clone_layer(layer.layer, **config)

    def carry(_, new):
        new.kernel.assign(kernel)
        new.bias.assign(bias)
        return ()

    return Rewrite(layer, make, carry)


def _changed_weights(plan: FoldPlan, preceding: Folding | None, layer: Any) -> LinearWeights:
    """The weights of a linear layer with all that it absorbs."""
    weights = LinearWeights(layer)
    for absorption in plan.absorptions:
        if absorption.layer is layer:
            weights.absorb(*absorption.rescaling.values())
    if preceding is not None:
        weights.rescale_output(preceding.scale, preceding.offset)
    return weights


def _with_bias(layer: Any) -> Any:
    return clone_layer(layer) if layer.use_bias else clone_layer(layer, **WITH_BIAS)


def _changed(layer: Any, weights: functools.partial[LinearWeights]) -> Rewrite:
    """A linear layer that absorbs something."""

    def carry(_, new):
        weights().assign(new)
        return ()

    return Rewrite(layer, lambda: _with_bias(layer), carry)


class _GatedLinear(NamedTuple):
    """A linear layer that reads a product with a gate, and what the gate adds to its output."""

    linear: Any
    response: Any
    add: Any

    def apply(self, reads, *args, **kwargs):
        return self.add([self.linear(*args, **kwargs), *map(self.response, reads)])


def _gated(
    layer: Any,
    weights: functools.partial[LinearWeights],
    gated: GatedOffset,
    preceding: Folding | None,
    taken: set[str],
) -> Rewrite:
    """A linear layer that reads a product with a gate, of an input that had an offset."""
    names = [_free_name(f"{layer.name}_{part}", taken) for part in ("offset", "with_offset")]

    def make():
        response = type(layer)(
            layer.filters, 1, data_format=layer.data_format, use_bias=False, name=names[0], dtype=dtype_of(layer)
        )
        return _GatedLinear(_with_bias(layer), response, keras.layers.Add(name=names[1], dtype=dtype_of(layer)))

    def carry(_, new):
        weights().assign(new.linear)
        response = LinearWeights(layer).response(gated.rescaling.values()[1])
        new.response.kernel.assign(response if preceding is None else response * preceding.scale)
        return ()

    return Rewrite(layer, make, carry, reads=(gated.gate,), call=_GatedLinear.apply)


def _free_name(name: str, taken: set[str]) -> str:
    """A name like `name` that no operation has; it is taken from then on."""
    candidates: Iterable[str] = (name, *(f"{name}_{number}" for number in range(1, len(taken) + 2)))
    free = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(free)
    return free
