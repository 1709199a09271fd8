"""The fast forms of the kernels on TensorFlow."""

__all__: list[str] = []
