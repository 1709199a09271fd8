"""Exports that leave sizes other than the batch open: a layer that Keras cannot trace then, and sizes to try."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_proxynorm.graph.reading import is_functional, is_sequential, read_graphs
from keras_proxynorm.graph.rewriting import Rewrite, clone

__all__ = ["has_open_sizes", "sizes_to_try", "with_fixed_sizes", "with_traceable_resizing"]

# Along the axes that follow the batch. The first two are for most models: multiples of 32, and not all the same.
_SIZES = ((64, 64, 64), (96, 64, 64), (96, 96, 96), (128, 96, 64), (224, 224, 64), (256, 224, 64))


def has_open_sizes(signature: Sequence[Any]) -> bool:
    """Whether a list of `tf.TensorSpec` leaves sizes open besides the batch."""
    return any(None in spec.shape[1:] for spec in signature)


def sizes_to_try(shapes: Iterable[Sequence[int | None]]) -> Iterator[tuple[int, ...]]:
    """Sizes for the axes that follow the batch, most likely ones first; one empty tuple if `shapes` leave none open."""
    open_axes = [axis for shape in shapes for axis, size in enumerate(shape[1:]) if size is None]
    count = max(open_axes, default=-1) + 1
    sizes = ((*sizes, *[sizes[-1]] * count)[:count] for sizes in _SIZES)
    yield from dict.fromkeys(sizes)


def with_fixed_sizes(shape: Sequence[int | None], batch_size: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """A shape with an open batch size and open sizes fixed."""
    fixed = (size or sizes[axis] for axis, size in enumerate(shape[1:]))
    return (shape[0] or batch_size, *fixed)


class _TraceableUpSampling2D(keras.layers.UpSampling2D):
    """UpSampling2D that interpolates images of a size that is known only when it runs."""

    def call(self, inputs):
        import tensorflow as tf

        images = ops.transpose(inputs, (0, 2, 3, 1)) if self.data_format == "channels_first" else inputs
        size = tf.shape(images)[1:3] * tf.constant(self.size)
        images = tf.cast(tf.image.resize(images, size, self.interpolation), inputs.dtype)
        return ops.transpose(images, (0, 3, 1, 2)) if self.data_format == "channels_first" else images


def with_traceable_resizing(served: keras.Model) -> keras.Model:
    """`served`, or a copy in which each UpSampling2D that interpolates can be traced with open sizes."""
    if not (is_functional(served) or is_sequential(served)):
        return served
    graphs = read_graphs(served)
    layers = {
        call.operation: _rewrite(call.operation)
        for graph in graphs
        for call in graph.calls
        if type(call.operation) is keras.layers.UpSampling2D and call.operation.interpolation != "nearest"
    }
    return clone(graphs, layers.values()).model if layers else served


def _rewrite(layer) -> Rewrite:
    return Rewrite(layer, lambda: _TraceableUpSampling2D.from_config(layer.get_config()), lambda *_: ())
