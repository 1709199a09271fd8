"""Batches, one at a time, of any data that `fit` takes."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

from keras_proxynorm.arguments import as_positive_integer, as_positive_integer_or_none

__all__ = ["Batch", "batches"]

# Inputs, targets and sample weights; the last two may be None.
Batch: TypeAlias = tuple


def batches(data: Any, batch_size: int = 32, steps: int | None = None, verbose: int = 0) -> Iterator[Batch]:
    """Yields the batches of data once.

    Args:
        data: Inputs, or a tuple ``(inputs, targets)`` or ``(inputs, targets, sample_weights)``, of arrays, tensors or
            structures of these; or a `keras.utils.PyDataset`, a `tf.data.Dataset`, a `torch` data loader, a generator,
            a list of tuples or any other iterable of such batches.
        batch_size: Positive integer, the size of the batches that arrays are split into.
        steps: Positive integer, the maximum number of batches, or None for all. Data that is known to be endless needs
            it.
        verbose: 1 for a progress bar, 0 for none.

    Yields:
        Tuples ``(inputs, targets, sample_weights)``.

    Raises:
        ValueError: If an argument is not of the form above, or if there is no batch.
    """
    batch_size = as_positive_integer("batch_size", batch_size)
    steps = as_positive_integer_or_none("steps", steps)
    source, count = _source(data, batch_size)
    if steps is None and _is_endless(data):
        raise ValueError(
            "Argument `steps` must be a positive integer, the number of batches to take, for data that never ends. "
            f"Received: steps=None, data of the type {type(data).__name__}"
        )
    return _with_progress(source, count, steps, verbose)


def _source(data, batch_size) -> tuple[Iterable, int | None]:
    """All batches, and their number if it is known."""
    if isinstance(data, keras.utils.PyDataset):
        count = data.num_batches
        indices: Iterable[int] = itertools.count() if count is None else range(int(count))
        return (data[index] for index in indices), count
    if isinstance(data, list) and data and all(isinstance(batch, tuple) for batch in data):
        return data, len(data)
    leaves = [leaf for leaf in keras.tree.flatten(data) if leaf is not None]
    if leaves and all(hasattr(leaf, "shape") for leaf in leaves):
        sizes = {leaf.shape[0] if len(leaf.shape) else None for leaf in leaves}
        if len(sizes) > 1 or not all(sizes):
            raise ValueError(
                "Argument `data` must have arrays with the same number of samples along their first axis, not 0. "
                f"Received: arrays of shapes {[tuple(leaf.shape) for leaf in leaves]}"
            )
        size = int(leaves[0].shape[0])
        starts = range(0, size, batch_size)
        # A list holds several inputs; only a tuple has targets.
        data = data if isinstance(data, tuple) else (data,)

        def cut(start):
            return keras.tree.map_structure(lambda x: None if x is None else x[start : start + batch_size], data)

        return map(cut, starts), len(starts)
    if isinstance(data, (str, bytes, dict)) or not isinstance(data, Iterable):
        raise ValueError(
            "Argument `data` must be arrays, a tuple (inputs, targets), or a dataset of batches. "
            f"Received: data of the type {type(data).__name__}"
        )
    try:
        count = len(data)  # type: ignore[arg-type]
    except TypeError:
        # TensorFlow datasets of unknown or infinite length, and generators.
        count = None
    return data, count


def _is_endless(data):
    """Whether data says of itself that it never ends; generators cannot."""
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches is None
    # tf.data has -1 for infinity, -2 for a number that is not known.
    cardinality = getattr(data, "cardinality", None)
    return isinstance(data, itertools.cycle) or (callable(cardinality) and int(cardinality()) == -1)


def _with_progress(source, count, steps, verbose):
    if steps is not None:
        count = steps if count is None else min(count, steps)
    bar = keras.utils.Progbar(count, verbose=verbose, unit_name="batch")
    done = 0
    for done, batch in enumerate(source, 1):
        yield _as_batch(batch)
        bar.update(done)
        if done == steps:
            break
    if not done:
        raise ValueError("Argument `data` must have at least one batch. Received: data without any")
    if count is None:
        bar.update(done, finalize=True)


def _as_batch(batch):
    if keras.backend.backend() != "tensorflow":
        # TensorFlow datasets yield tensors of TensorFlow.
        batch = keras.tree.map_structure(_as_array, batch)
    return keras.utils.unpack_x_y_sample_weight(batch)


def _as_array(x):
    if x is None:
        return None
    return keras.ops.convert_to_numpy(x) if keras.ops.is_tensor(x) else np.asarray(x)
