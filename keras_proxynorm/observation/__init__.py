"""Observes the calls of layers while a model runs as it is: hooks, the choice of layers, channels."""

__all__: list[str] = []
