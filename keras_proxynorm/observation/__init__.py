"""Looks at the calls of layers while a model runs as it is."""

__all__: list[str] = []
