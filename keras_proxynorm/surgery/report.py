"""What a replacement did, for people to read and for programs."""

import collections
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field

__all__ = ["LayerReport", "ReplacementReport"]


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
        center: Whether the replacement has an offset, or None if it was left alone.
        frozen: Whether its weights are frozen, as they were.
        weights: The names of the weights that were carried over.
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
    center: bool | None = None
    frozen: bool = False
    weights: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_normalization` did. Print it, or take its `to_dict()`.

    Attributes:
        model: The name of the model.
        to: What the normalizations were replaced by.
        layers: A `LayerReport` for each normalization layer, in the order of the model.
        parameters_before: The number of the model's parameters.
        parameters_after: The number of those of the new model.
        compensated: For each layer whose weights took the rescaling by proxy normalization back, by its path: the
            paths of the normalizations that it reads. Only with `compensate=True`.
        uncompensated: For each layer that reads a rescaled activation and could not take it back, by its path: why.
        warnings: What did not come through as it was.
    """

    model: str
    to: str
    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    compensated: dict[str, tuple[str, ...]] = field(default_factory=dict)
    uncompensated: dict[str, str] = field(default_factory=dict)
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
        rows = [("layer", "became", "groups", "")]
        for layer in self.layers:
            names = " and ".join(layer.names) or "-"
            notes = [
                f"with {layer.activation}" if layer.activation else "",
                "without offset" if layer.center is False else "",
                "frozen" if layer.frozen else "",
                layer.reason or "",
            ]
            action = f"{layer.action}: {names}" if layer.names else layer.action
            rows.append((layer.path, action, str(layer.groups or ""), ", ".join(note for note in notes if note)))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for *cells, note in rows:
            yield "  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), note]).rstrip()

    def _summary(self):
        yield f"{self.model}: {self.replaced} of {len(self.layers)} normalization layers replaced by {self.to}"
        for action, meaning in (
            ("fused", "together with the activation"),
            ("split", "one layer with the activation, one without"),
            ("plain", "no activation, or none that can be fused"),
            ("left alone", ""),
        ):
            layers = [layer for layer in self.layers if layer.action == action]
            if layers:
                details = collections.Counter(layer.activation or layer.reason for layer in layers)
                listed = ", ".join(f"{count} {detail}" for detail, count in details.items() if detail)
                yield f"  {action + ':':<14}{len(layers):>4}  {'; '.join(x for x in (meaning, listed) if x)}".rstrip()
        if self.groups:
            yield "  groups:         " + ", ".join(f"{groups} in {count}" for groups, count in self.groups.items())
        yield f"  parameters:     {self.parameters_before:,} before, {self.parameters_after:,} after"
        if self.compensated or self.uncompensated:
            yield f"  compensated:    {len(self.compensated)} layers; not possible in {len(self.uncompensated)}:"
            reasons = collections.Counter(self.uncompensated.values())
            for reason, count in reasons.items():
                yield f"    {count} times: {reason}"
        for warning in self.warnings:
            yield f"  warning:        {warning}"


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
