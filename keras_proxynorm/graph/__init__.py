"""A functional model as a graph, and changing it; knows no normalization of the package."""

__all__: list[str] = []
