"""What a replacement did, for people to read and for programs."""

import collections
from dataclasses import dataclass, field
from typing import Any

from keras_proxynorm.graph.report import LEFT_ALONE, LayerEntry, Report, counted, details

__all__ = ["LayerReport", "ReplacementReport", "Uncompensated"]


@dataclass(frozen=True)
class Uncompensated:
    """A place where the rescaling by proxy normalization could not be taken back.

    Attributes:
        path: The layer that reads what is rescaled, or the output that is.
        reason: Why not.
        sources: The paths of the normalizations that it comes from.
    """

    path: str
    reason: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class LayerReport(LayerEntry):
    """What became of one normalization layer.

    Attributes:
        path: The layer's name, preceded by the names of the models that it is nested in.
        layer: The name of its class.
        action: `"fused"`: replaced together with its activation. `"plain"`: replaced without an activation. `"split"`:
            its output was read with and without an activation, so that it was replaced by one layer of each kind.
            `"left alone"`.
        names: The names of the layers that replace it.
        activation: The activation that is now fused with the replacement, or None.
        absorbed: The names of the activations that vanished.
        channels: The number of channels, or None if it was left alone.
        groups: The number of groups of channels, or None if the replacement has none.
        linear: The name of the preceding linear layer that the replacement absorbed, or None.
        center: Whether the replacement has a `beta`, or None if it was left alone.
        frozen: Whether its weights are frozen, as they were.
        weights: The names of the weights that were carried over.
        calibrated: Whether `gamma`, `beta` and proxy were then set with the batch `calibrate`.
        reason: Why it was left alone, or why there is no activation in the replacement; or None.

    Example:

    >>> from keras_proxynorm.surgery import LayerReport
    >>> LayerReport("backbone/norm", "BatchNormalization", "plain").reason is None
    True
    """

    reason: str | None = None
    names: tuple[str, ...] = ()
    activation: str | None = None
    absorbed: tuple[str, ...] = ()
    channels: int | None = None
    groups: int | None = None
    linear: str | None = None
    center: bool | None = None
    frozen: bool = False
    weights: tuple[str, ...] = ()
    calibrated: bool = False


_MEANINGS = {
    "fused": "with the activation that followed",
    "split": "into a layer with the activation that followed and one without",
    "plain": "without activation",
    LEFT_ALONE: "as they were",
}


@dataclass(frozen=True)
class ReplacementReport(Report):
    """What `replace_normalization` did. Print it, or take its `to_dict()`.

    Attributes:
        model: The name of the model.
        to: What the normalizations were replaced by.
        layers: A `LayerReport` for each normalization layer, in the order of the model.
        hidden: How many batch normalizations are inside layers, where the graph of the model does not lead, and are as
            they were, by the paths of these layers.
        parameters_before: The number of the model's parameters.
        parameters_after: The number of those of the new model.
        compensated: For each layer whose weights took the rescaling by proxy normalization back, by its path: the
            paths of the normalizations that it reads. Only with `compensate=True` or `calibrate`.
        uncompensated: An `Uncompensated` for each place where that was not possible.
        warnings: What did not come through as it was.

    Example:

    >>> import keras, keras_proxynorm
    >>> layers = [keras.Input((8, 8, 4)), keras.layers.BatchNormalization(name="norm"), keras.layers.ReLU(name="relu")]
    >>> model = keras.Sequential(layers, name="small")
    >>> _, report = keras_proxynorm.replace_normalization(model, return_report=True)
    >>> print(report)
    layer  became       groups  notes
    norm   fused: relu  1       with relu
    <BLANKLINE>
    small: 1 of 1 normalization layers replaced by group_norm_proxy
      fused              1  with the activation that followed
                         1  - relu
      groups          1 (1x)
      parameters      16 before, 16 after
    """

    model: str
    to: str
    layers: tuple[LayerReport, ...]
    hidden: dict[str, int]
    parameters_before: int
    parameters_after: int
    compensated: dict[str, tuple[str, ...]] = field(default_factory=dict)
    uncompensated: tuple[Uncompensated, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def replaced(self) -> int:
        """The number of normalization layers that were replaced."""
        return len(self.layers) - self.count(LEFT_ALONE)

    @property
    def groups(self) -> dict[int, int]:
        """How many layers have how many groups, by the number of groups."""
        counts = collections.Counter(layer.groups for layer in self.layers if layer.groups is not None)
        return dict(sorted(counts.items(), reverse=True))

    def to_dict(self) -> dict[str, Any]:
        groups = {str(groups): count for groups, count in self.groups.items()}
        counts = {action: self.count(action) for action in _MEANINGS}
        return {**super().to_dict(), "groups": groups, "counts": counts}

    def _rows(self):
        yield "layer", "became", "groups", "notes"
        for layer in self.layers:
            became = f"{layer.action}: {' and '.join(layer.names)}" if layer.names else layer.action
            notes = [
                layer.layer if layer.layer != "BatchNormalization" else "",
                f"with {layer.linear}" if layer.linear else "",
                f"with {layer.activation}" if layer.activation else "",
                f"also {', '.join(layer.absorbed[1:])}" if layer.absorbed[1:] else "",
                "without beta" if layer.center is False else "",
                "frozen" if layer.frozen else "",
                layer.reason or "",
            ]
            yield layer.path, became, layer.groups or "", "; ".join(note for note in notes if note)

    def _summary(self):
        yield f"{self.model}: {self.replaced} of {len(self.layers)} normalization layers replaced by {self.to}"
        for action, meaning in _MEANINGS.items():
            layers = [layer for layer in self.layers if layer.action == action]
            if layers:
                yield counted(action, len(layers), meaning)
            yield from details(layer.activation for layer in layers)
        if self.hidden:
            yield counted("not reached", sum(self.hidden.values()), "inside layers:")
            for path, count in self.hidden.items():
                yield counted("", count, f"- {path}")
        if self.groups:
            yield f"  {'groups':<14}  " + ", ".join(f"{groups} ({count}x)" for groups, count in self.groups.items())
        calibrated = sum(layer.calibrated for layer in self.layers)
        if calibrated:
            yield counted("calibrated", calibrated, "so that they do with the batch what the old ones do")
        yield f"  {'parameters':<14}  {self.parameters_before:,} before, {self.parameters_after:,} after"
        if self.compensated or self.uncompensated:
            yield counted("compensated", len(self.compensated), "layers that take the rescaling of their input back")
            yield counted("not possible", len(self.uncompensated), "")
            for reason, count in collections.Counter(place.reason for place in self.uncompensated).items():
                (path, *_) = (place.path for place in self.uncompensated if place.reason == reason)
                yield counted("", count, f"- {reason} ({'e.g. ' if count > 1 else ''}{path})")
        yield from self._closing_lines()
