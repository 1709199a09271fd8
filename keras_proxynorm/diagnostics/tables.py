"""A table with a row for each layer, which the results of diagnostics are."""

import abc
from typing import Any, ClassVar

import numpy as np

__all__ = ["LayerTable"]


class LayerTable(abc.ABC):
    """Columns of numbers, with a row for each layer in `names`."""

    names: tuple[str, ...]
    # The format of numbers in `str`.
    number_format: ClassVar[str] = "{:.4g}"

    @abc.abstractmethod
    def columns(self) -> dict[str, np.ndarray]:
        """The columns: arrays with a number for each layer."""

    def __len__(self):
        return len(self.names)

    def __str__(self):
        columns = self.columns()
        width = max(map(len, ("layer", *self.names)))
        lines = [f"{'layer':<{width}}" + "".join(f"{title:>{_width(title)}}" for title in columns)]
        for i, name in enumerate(self.names):
            numbers = "".join(f"{self.number_format.format(x[i]):>{_width(title)}}" for title, x in columns.items())
            lines.append(f"{name:<{width}}{numbers}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, list]:
        """Lists by column: ``"layer"``, the names, and those of `columns`."""
        return {"layer": list(self.names), **{title: values.tolist() for title, values in self.columns().items()}}

    def to_frame(self) -> Any:
        """The columns as a `pandas.DataFrame`, with the names of the layers as index.

        Raises:
            ImportError: If pandas is not installed: ``pip install pandas``.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("A DataFrame needs: pip install pandas") from error
        return pandas.DataFrame(self.columns(), index=pandas.Index(self.names, name="layer"))


def _width(title):
    return max(len(title), 9) + 2
