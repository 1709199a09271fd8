"""The inference form of a model: its normalizations folded into constants, and those into the layers around them."""

import collections
import warnings
from dataclasses import dataclass
from typing import Literal, overload

import keras

from keras_proxynorm.folding.planning import FoldPlan, plan_folding
from keras_proxynorm.folding.rewrites import rewrites
from keras_proxynorm.graph.reading import check_readable, read_graphs
from keras_proxynorm.graph.report import LEFT_ALONE, LayerEntry, Report, counted
from keras_proxynorm.graph.rewriting import clone

__all__ = ["FoldReport", "fold", "fold_with_report"]


@dataclass(frozen=True)
class FoldReport(Report):
    """What `fold` did. Print it, or take its `to_dict()`.

    Attributes:
        model: The name of the model.
        layers: For each normalization a `LayerEntry`: its `path`, the class of its `layer`, the `action`, and the
            `reason` why it was left alone, or why the following layers do not absorb all that they might.
        absorbed: For each linear layer that absorbed something from preceding normalizations, by its path: from which.
        warnings: What did not come through as it was.

    Example:

    >>> import keras, keras_proxynorm
    >>> from keras_proxynorm.export import fold
    >>> layers = [keras.Input((8,)), keras.layers.Dense(8), keras.layers.BatchNormalization(name="norm")]
    >>> _, report = fold(keras.Sequential(layers, name="small"), return_report=True)
    >>> print(report)
    layer  was                 became                    not done, because
    norm   BatchNormalization  into the preceding layer
    <BLANKLINE>
    small: 1 of 1 normalization layers folded
                         1  BatchNormalization into the preceding layer
    """

    model: str
    layers: tuple[LayerEntry, ...]
    absorbed: dict[str, tuple[str, ...]]
    warnings: tuple[str, ...] = ()

    @property
    def folded(self) -> dict[str, str]:
        """What became of each normalization that was folded, by its path."""
        return {x.path: f"{x.layer} {x.action}" for x in self.layers if x.action != LEFT_ALONE}

    def _rows(self):
        yield "layer", "was", "became", "not done, because"
        for layer in self.layers:
            yield layer.path, layer.layer, layer.action, layer.reason or ""

    def _summary(self):
        yield f"{self.model}: {len(self.folded)} of {len(self.layers)} normalization layers folded"
        for kind, count in collections.Counter(self.folded.values()).most_common():
            yield counted("", count, kind)
        yield from self._closing_lines()


@overload
def fold(model: keras.Model, *, return_report: Literal[False] = False) -> keras.Model: ...


@overload
def fold(model: keras.Model, *, return_report: Literal[True]) -> tuple[keras.Model, FoldReport]: ...


def fold(model: keras.Model, *, return_report: bool = False) -> keras.Model | tuple[keras.Model, FoldReport]:
    """Makes the inference form of a model: the same function, with all that depends on weights alone computed once.

    - The mean and variance of each proxy become constants, computed in float64 and rounded once. The affine and proxy
      normalization of a layer merge; what remains after the activation, a scale and an offset of each channel, is
      absorbed by the dense, convolution, depthwise and separable layers that read the output, where that is exact:
      also through pooling, cropping, padding, reshapes, concatenation and products, but no offset by what reads
      zeros of a padding in its place, and none through a product.
    - A `BatchNormalization` is absorbed by the preceding linear layer, or else by the following ones, or else becomes a
      scale and an offset. So does a layer of `keras_proxynorm.baselines` that is no more than that at inference; one
      that contains a linear layer becomes that layer, where the kernel at inference is a constant.
    - A `GroupNormalization` keeps its statistics, with gamma and beta as constants.

    Normalizations become `FoldedNormalization` layers or, where nothing is left to do, `keras.layers.Identity`. All
    layers keep their names. The source model is not changed. What is not understood stays what it is, and the report
    says why: subclasses that override a method, and normalizations that look at their inputs in a way of their own. So
    do normalizations inside of other layers, where the graph of the model does not lead.

    Args:
        model: A functional or sequential model that is built. Models nested in it are folded, too.
        return_report: If True, return a report, too.

    Returns:
        The folded model, an ordinary Keras model that can be called and saved, with all weights frozen and equal to
        `model` up to rounding. To load it elsewhere, ``import keras_proxynorm.export`` first. With
        ``return_report=True`` also a `FoldReport`, which can be printed.

    Raises:
        ValueError: If the model is not built, if it is neither functional nor sequential, or if a layer cannot be
            cloned, which the message names.

    Example:

    >>> import keras, keras_proxynorm
    >>> from keras_proxynorm.export import fold
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3)])
    >>> model.add(keras_proxynorm.LayerNormProxy(name="norm"))
    >>> model.add(keras.layers.GlobalAveragePooling2D())
    >>> model.add(keras.layers.Dense(10, name="logits"))
    >>> folded, report = fold(model, return_report=True)
    >>> report.absorbed
    {'logits': ('norm',)}
    >>> x = keras.random.normal((1, 8, 8, 3))
    >>> bool(keras.ops.max(keras.ops.abs(folded(x) - model(x))) < 1e-5)
    True

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743)
    """
    folded, report = fold_with_report(model)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=2)
    return (folded, report) if return_report else folded


def fold_with_report(model: keras.Model, through_gates: bool = False) -> tuple[keras.Model, FoldReport]:
    """As `fold`, with the warnings in the report alone.

    Args:
        model: As there.
        through_gates: Whether an offset before a squeeze-and-excite gate becomes a small convolution of the gate,
            which is added after the layer that reads the product. It saves a pass over the larger tensor, where
            starting a small convolution costs less than that.
    """
    check_readable(model)
    graphs = read_graphs(model)
    plan = plan_folding(graphs, through_gates)
    cloned = clone(graphs, rewrites(plan, graphs))
    cloned.model.trainable = False
    absorbed = {absorption.path: absorption.rescaling.sources for absorption in plan.absorptions}
    return cloned.model, FoldReport(model.name, tuple(_entries(plan)), absorbed, tuple(cloned.notes))


def _entries(plan: FoldPlan):
    for layer, folding in plan.foldings.items():
        yield LayerEntry(folding.path, type(layer).__name__, folding.action, folding.obstacle)
    for layer, path in plan.contained.items():
        yield LayerEntry(path, type(layer).__name__, "into the linear layer inside of it", None)
    for layer, (path, reason) in plan.reasons.items():
        yield LayerEntry(path, type(layer).__name__, LEFT_ALONE, reason)
