"""What the reports of all passes over a model share: an entry for each layer, what was not done and why, a table."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LayerEntry", "Report", "counted"]

LEFT_ALONE = "left alone"


@dataclass(frozen=True)
class LayerEntry:
    """What became of one layer.

    Attributes:
        path: The layer's name, preceded by the names of the models that it is nested in.
        layer: The name of its class.
        action: What became of it, in a word or two; `"left alone"` if nothing did.
        reason: Why something was not done; or None.
    """

    path: str
    layer: str
    action: str
    reason: str | None


class Report:
    """What a pass over a model did. Print it, or take its `to_dict()`."""

    model: str
    layers: Any
    warnings: tuple[str, ...]

    def count(self, action: str) -> int:
        """The number of layers with this `action`, such as `"left alone"`."""
        return sum(layer.action == action for layer in self.layers)

    @property
    def not_done(self) -> dict[str, str]:
        """The reasons why layers were left alone, or became something less, by the paths of the layers."""
        return {layer.path: layer.reason for layer in self.layers if layer.reason is not None}

    def to_dict(self) -> dict[str, Any]:
        """The report as a dictionary of strings, numbers, lists and dictionaries, for `json.dump`."""
        counts = collections.Counter(layer.action for layer in self.layers)
        return _plain({**asdict(self), "counts": dict(counts), "not_done": self.not_done})  # type: ignore[call-overload]

    def summary(self) -> str:
        """The report without its table."""
        return "\n".join(self._summary())

    def __str__(self) -> str:
        return "\n".join([*_table(self._rows()), "", self.summary()])

    def _rows(self) -> Iterable[Sequence[str]]:
        """The rows of the table, the titles first."""
        raise NotImplementedError

    def _summary(self) -> Iterable[str]:
        """The lines after the table."""
        raise NotImplementedError

    def _closing_lines(self) -> Iterator[str]:
        """The lines about what was not done, and the warnings."""
        if self.not_done:
            yield counted("not done", len(self.not_done), "because")
            yield from details(self.not_done.values())
        for warning in self.warnings:
            yield f"  {'warning':<14}  {warning}"


def counted(title: str, count: int, meaning: str) -> str:
    """A line of a summary."""
    return f"  {title:<14}{count:>6}  {meaning}".rstrip()


def details(descriptions: Iterable[str | None]) -> Iterator[str]:
    """Lines that follow one of `counted`, with how often each description occurs."""
    for description, count in collections.Counter(descriptions).items():
        if description is not None:
            yield counted("", count, f"- {description}")


def _table(rows):
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
