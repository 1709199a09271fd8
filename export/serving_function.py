"""A model as a function of named tensors with a fixed signature, which every export traces."""

import inspect
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_proxynorm.arguments import as_positive_integer_or_none, check_built_model
from keras_proxynorm.kernels import reduction

__all__ = ["serving_function"]


def serving_function(
    model: keras.Model,
    batch_size: int | None,
    input_shape: Sequence | Mapping | None,
    served: keras.Model | None = None,
) -> tuple[Callable[..., dict[str, Any]], list[Any]]:
    """The inference function of a model, and the signature to trace it with.

    Args:
        model: A built model.
        batch_size: Positive integer, or None for any batch size.
        input_shape: Sizes of the inputs without the batch: None, a tuple, or a list or dict of tuples. A size that is
            None stays open.
        served: The model that computes, such as the folded one, under the names of `model`. Defaults to `model`.

    Returns:
        ``(function, signature)``: a function of one tensor for each input that returns a dict of named outputs, and a
        list of named `tf.TensorSpec`, one for each input.

    Raises:
        RuntimeError: If the Keras backend is not TensorFlow.
        ValueError: If the model is not built, or if the arguments do not fix the shapes of its inputs.
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "Exporting needs the TensorFlow backend of Keras. Save the model with model.save('model.keras'), then load "
            "and export it in a process that runs with KERAS_BACKEND=tensorflow. "
            f"Received: keras.backend.backend()={keras.backend.backend()!r}"
        )
    import tensorflow as tf

    check_built_model(model)
    batch_size = as_positive_integer_or_none("batch_size", batch_size)
    if getattr(model, "inputs", None) is None:
        structure, inputs = _declared_inputs(model, input_shape)
    else:
        structure, inputs = _known_inputs(model, batch_size, input_shape)
    for tensor in inputs:
        if not re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9_.-]*", tensor.name):
            raise ValueError(
                "The names of the inputs of `model` must begin with a letter or a digit and have only letters, digits, "
                f"'.', '_' and '-'. Received: an input with name={tensor.name!r}"
            )

    def serve(*tensors):
        # The traced function may run on another device.
        with reduction("sum"):
            outputs = (served or model)(keras.tree.pack_sequence_as(structure, tensors), training=False)
        return _name_outputs(model, outputs)

    return serve, [tf.TensorSpec((batch_size, *tensor.shape[1:]), tensor.dtype, tensor.name) for tensor in inputs]


def _known_inputs(model, batch_size, input_shape):
    """The structure that a functional or sequential model is called with, and its inputs as a list."""
    names = [tensor.name for tensor in model.inputs]
    inputs = []
    for tensor, given in zip(model.inputs, _align(input_shape, names), strict=True):
        own = tensor.shape[1:]
        if given is None and None in own:
            example = tuple(size or 224 for size in own)
            several = f", in a list or dict with a tuple for each of {names}" if len(names) > 1 else ""
            raise ValueError(
                f"Argument `input_shape` must give the sizes that the input '{tensor.name}' of shape {own} leaves "
                f"open, for example {example}, or say that the file leaves them open, too: {own}{several}. "
                f"Received: input_shape={input_shape!r}"
            )
        shape = own if given is None else tuple(given)
        if len(shape) != len(own) or any(size not in (None, other) for size, other in zip(own, shape, strict=True)):
            raise ValueError(
                f"Argument `input_shape` must agree with the shape {own} of the input '{tensor.name}', without the "
                f"batch. Received: input_shape={input_shape!r}"
            )
        # A Sequential that was built by a call records the batch size of that call, which is no restriction.
        if not isinstance(model, keras.Sequential) and tensor.shape[0] not in (None, batch_size):
            raise ValueError(
                f"Argument `batch_size` must be {tensor.shape[0]}, which the input '{tensor.name}' was made with. "
                f"Received: batch_size={batch_size!r}"
            )
        inputs.append(keras.KerasTensor((None, *shape), dtype=tensor.dtype, name=tensor.name))
    return (inputs[0] if isinstance(model, keras.Sequential) else model.input), inputs


def _declared_inputs(model, input_shape):
    """The same for a subclassed model, which has no record of its inputs."""
    first, *others = inspect.signature(model.call).parameters.values()
    if any(other.default is other.empty and other.kind == other.POSITIONAL_OR_KEYWORD for other in others):
        raise ValueError(
            "Argument `model` must take its inputs as one argument: a tensor, a list or a dict. Wrap it in a "
            "functional model, keras.Model(inputs, model(*inputs)). "
            f"Received: model={model!r}, whose `call` needs more arguments"
        )
    if input_shape is None:
        raise ValueError(
            "Argument `input_shape` must give the sizes of the inputs without the batch, because a subclassed model "
            "has no record of them: a tuple like (224, 224, 3), or a list or dict of tuples for the list or dict that "
            "the model takes. Received: input_shape=None"
        )

    def tensor(name, shape):
        # The dtype that keras.Input would have.
        return keras.KerasTensor((None, *shape), dtype=keras.config.floatx(), name=name)

    if isinstance(input_shape, dict):
        shapes = _align(input_shape, list(input_shape))
        structure: Any = {name: tensor(name, shape) for name, shape in zip(input_shape, shapes, strict=True)}
    elif isinstance(input_shape, (list, tuple)) and not _is_shape(input_shape):
        names = [f"{first.name}_{i}" for i in range(len(input_shape))]
        structure = [tensor(name, shape) for name, shape in zip(names, _align(input_shape, names), strict=True)]
    else:
        structure = tensor(first.name, *_align(input_shape, [first.name]))
    return structure, keras.tree.flatten(structure)


def _align(input_shape, names):
    """One shape, or None, for each of the inputs with these names."""
    if input_shape is None:
        return [None] * len(names)
    if isinstance(input_shape, dict):
        shapes = [input_shape.get(name) for name in names] if set(input_shape) == set(names) else []
    else:
        shapes = [input_shape] if _is_shape(input_shape) else input_shape
    if not isinstance(shapes, (list, tuple)) or len(shapes) != len(names) or not all(map(_is_shape, shapes)):
        raise ValueError(
            "Argument `input_shape` must be a tuple of the sizes without the batch, positive integers or None for an "
            f"open size, or a list or dict with such a tuple for each of the inputs {names}. "
            f"Received: input_shape={input_shape!r}"
        )
    return shapes


def _is_shape(value):
    return isinstance(value, (list, tuple)) and all(size is None or _is_size(size) for size in value)


def _is_size(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0


def _name_outputs(model, outputs):
    """The outputs as a flat dict, named after their keys, or else after the layers that they come from."""
    tensors = keras.tree.flatten(outputs)
    if isinstance(outputs, dict):
        names = ["_".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(outputs)]
    elif isinstance(model, keras.Sequential):
        names = [model.layers[-1].name] * len(tensors)
    else:
        names = getattr(model, "output_names", ["output"] * len(tensors))
    named: dict[str, Any] = {}
    for name, tensor in zip(names, tensors, strict=True):
        # One layer may have several of the outputs.
        repeats = sum(other == name for other in names[: len(named)])
        named[f"{name}_{repeats}" if repeats else name] = tensor
    return named
