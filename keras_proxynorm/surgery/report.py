"""What a replacement did, for people to read and for programs."""

import collections
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field

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
class LayerReport:
    """What became of one normalization layer.

    Attributes:
        path: The layer's name, behind the names of the models that it is nested in.
        layer: The name of its class.
        action: `"fused"`: replaced together with its activation. `"plain"`: replaced without an activation. `"split"`:
            its output was read with and without an activation, so that it was replaced by one layer of each kind.
            `"left alone"`.
        names: The names of the layers that replace it.
        activation: The activation that is now contained in the replacement, or None.
        absorbed: The names of the activations that vanished.
        channels: The number of channels, or None if it was left alone.
        groups: The number of groups of channels, or None if the replacement has none.
        linear: The name of the linear layer in front that is now contained in the replacement, or None.
        center: Whether the replacement has an offset, or None if it was left alone.
        frozen: Whether its weights are frozen, as they were.
        weights: The names of the weights that were carried over.
        calibrated: Whether scale, offset and proxy were then set with the data of `calibrate`.
        reason: Why it was left alone, or why an activation behind it was not fused with it; or None.
    """

    path: str
    layer: str
    action: str
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
    reason: str | None = None


@dataclass(frozen=True)
class ReplacementReport:
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

    def count(self, action: str) -> int:
        """The number of normalization layers with this `action`, such as `"fused"`."""
        return sum(layer.action == action for layer in self.layers)

    @property
    def replaced(self) -> int:
        """The number of normalization layers that were replaced."""
        return len(self.layers) - self.count("left alone")

    @property
    def groups(self) -> dict[int, int]:
        """How many layers have how many groups, by the number of groups."""
        counts = collections.Counter(layer.groups for layer in self.layers if layer.groups is not None)
        return dict(sorted(counts.items(), reverse=True))

    def to_dict(self) -> dict:
        """The report as a dictionary of strings, numbers, lists and dictionaries, for `json.dump`."""
        counts = {action: self.count(action) for action in ("fused", "split", "plain", "left alone")}
        groups = {str(groups): count for groups, count in self.groups.items()}
        return _plain({**asdict(self), "counts": counts, "groups": groups})

    def __str__(self) -> str:
        return "\n".join([*self._table(), "", *self._summary()])

    def _table(self):
        rows = [("layer", "became", "groups", "notes")]
        for layer in self.layers:
            became = f"{layer.action}: {' and '.join(layer.names)}" if layer.names else layer.action
            notes = [
                layer.layer if layer.layer != "BatchNormalization" else "",
                f"with {layer.linear}" if layer.linear else "",
                f"with {layer.activation}" if layer.activation else "",
                f"also {', '.join(layer.absorbed[1:])}" if layer.absorbed[1:] else "",
                "without offset" if layer.center is False else "",
                "frozen" if layer.frozen else "",
                layer.reason or "",
            ]
            rows.append((layer.path, became, str(layer.groups or ""), "; ".join(note for note in notes if note)))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for *cells, notes in rows:
            yield "  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), notes]).rstrip()

    def _summary(self):
        yield f"{self.model}: {self.replaced} of {len(self.layers)} normalization layers replaced by {self.to}"
        for action, meaning in (
            ("fused", "with the activation behind it, which vanished"),
            ("split", "into a layer with the activation behind it and one without"),
            ("plain", "without activation"),
            ("left alone", "as they were"),
        ):
            layers = [layer for layer in self.layers if layer.action == action]
            if layers:
                yield f"  {action:<14}{len(layers):>6}  {meaning}"
            details = collections.Counter(layer.activation or layer.reason for layer in layers)
            for detail, count in details.items():
                if detail is not None:
                    yield f"  {'':<14}{count:>6}  - {detail}"
        if self.hidden:
            yield f"  {'not reached':<14}{sum(self.hidden.values()):>6}  inside layers:"
            for path, count in self.hidden.items():
                yield f"  {'':<14}{count:>6}  - {path}"
        if self.groups:
            yield f"  {'groups':<14}  " + ", ".join(f"{groups} ({count}x)" for groups, count in self.groups.items())
        calibrated = sum(layer.calibrated for layer in self.layers)
        if calibrated:
            yield f"  {'calibrated':<14}{calibrated:>6}  so that they do with the data what the old ones do"
        yield f"  {'parameters':<14}  {self.parameters_before:,} before, {self.parameters_after:,} after"
        if self.compensated or self.uncompensated:
            yield f"  {'compensated':<14}{len(self.compensated):>6}  layers that take the rescaling of their input back"
            yield f"  {'not possible':<14}{len(self.uncompensated):>6}"
            for reason, count in collections.Counter(place.reason for place in self.uncompensated).items():
                (path, *_) = (place.path for place in self.uncompensated if place.reason == reason)
                yield f"  {'':<14}{count:>6}  - {reason} ({'e.g. ' if count > 1 else ''}{path})"
        for warning in self.warnings:
            yield f"  {'warning':<14}  {warning}"


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
