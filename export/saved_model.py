"""Export to a TensorFlow SavedModel in the layout of TensorFlow Serving."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_proxynorm.arguments import as_boolean, as_positive_integer_or_none
from keras_proxynorm.compat import convert_variables_to_constants
from keras_proxynorm.export.atomic import check_free, local_path, replacing
from keras_proxynorm.export.inference_model import inference_model, unfolded_model
from keras_proxynorm.export.logs import quiet
from keras_proxynorm.export.open_sizes import has_open_sizes, sizes_to_try, with_fixed_sizes
from keras_proxynorm.export.repeatability import check_repeatable
from keras_proxynorm.export.serving_function import serving_function
from keras_proxynorm.export.verification import verify_served
from keras_proxynorm.export.warm_up import write_warm_up_requests
from keras_proxynorm.folding.folded_normalization import set_form

__all__ = ["export_saved_model"]

# Bytes. A graph may have 2 GB, constants included.
_LARGEST_GRAPH = 1.5e9


def export_saved_model(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    batch_size: int | None = 1,
    input_shape: Sequence | Mapping | None = None,
    version: int | None = None,
    fold: bool = True,
    verify: bool | Callable[..., object] = True,
    warmup: bool = True,
    xla_signature: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes a model as a TensorFlow SavedModel, ``directory/<version>/``, for TensorFlow Serving or TensorFlow alone.

    The SavedModel contains the forward pass only, as the signature ``serving_default``. Its inputs have the names of
    the model's inputs. Its outputs have the keys of the model's output, or the names of the layers that they come from.
    It loads with ``tf.saved_model.load``, without Keras and without this package. It appears under its name only when
    it is complete and has been compared with the model. It computes in the dtypes of the model: one that was trained in
    mixed precision is served in mixed precision.

    Args:
        model: A built Keras model, on the TensorFlow backend.
        directory: The model's directory. It is made if it is missing.
        batch_size: Integer, the batch size that the SavedModel takes, or None for any. Defaults to 1.
        input_shape: Tuple of integers, the sizes of the input without the batch, or None for a size that stays open; a
            list of tuples in the order of ``model.inputs``, or a dict of tuples by name, for several inputs. Needed
            where the model leaves sizes open, and for subclassed models, whose `call` it describes: a tuple for a
            tensor, a list for a list, a dict for a dict.
        version: Positive integer, the name of the directory to write. Defaults to the one after the highest that is
            there, beginning with 1.
        fold: If True, export the inference form of the model, see `fold`, with its weights as constants, so that
            TensorFlow can optimize the graph; a model that cannot be folded is exported as it is, with a warning. If
            False, export the model as it is, with variables. Defaults to True.
        verify: If True, run the SavedModel in a fresh process and compare it with the model, see `verify`. Or a
            function to call in its place, with the same arguments. Defaults to True.
        warmup: If True, add a request that TensorFlow Serving runs while it loads the SavedModel, so that the first
            request of a user is not slow. Defaults to True.
        xla_signature: If True, add a second signature ``serving_xla`` that XLA compiles when it is first called. For
            accelerators; on a CPU XLA is slower. It has its own copy of the constants. Defaults to False.
        overwrite: If True, replace `version` if it exists. Defaults to False.

    Returns:
        The `pathlib.Path` of the version's directory.

    Raises:
        RuntimeError: If the Keras backend is not TensorFlow.
        ValueError: If the model is not built, if its shapes are not known and not given, if it draws random numbers or
            keeps state at inference, or if an argument is not of the form above.
        VerificationError: If the SavedModel does not compute what the model computes.
        FileExistsError: If `version` exists and `overwrite` is False.

    Example:

    >>> import tempfile
    >>> import keras, keras_proxynorm, tensorflow as tf
    >>> from keras_proxynorm.export import export_saved_model
    >>> image = keras.Input((8, 8, 1), name="image")
    >>> features = keras_proxynorm.LayerNormProxy(name="features")(keras.layers.Conv2D(16, 3)(image))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = export_saved_model(keras.Model(image, features), directory)
    ...     path.name
    ...     serve = tf.saved_model.load(path).signatures["serving_default"]
    ...     serve(image=tf.zeros((1, 8, 8, 1)))["features"].shape
    '1'
    TensorShape([1, 6, 6, 16])
    """
    folder = local_path("directory", directory)
    version = as_positive_integer_or_none("version", version)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Argument `directory` must not be a file. Received: directory={str(folder)!r}")
    as_boolean("fold", fold)
    as_boolean("warmup", warmup)
    as_boolean("xla_signature", xla_signature)
    if not callable(verify):
        as_boolean("verify", verify)
    target = folder / str(_next_version(folder) if version is None else version)
    check_free(target, overwrite)
    # Checks the arguments, before anything that takes time.
    _, signature = serving_function(model, batch_size, input_shape)
    if fold:
        served, _ = inference_model(model, "tensorflow", open_sizes=has_open_sizes(signature))
    else:
        served = unfolded_model(model, open_sizes=has_open_sizes(signature))
    serve, _ = serving_function(model, batch_size, input_shape, served)
    check_repeatable(served, serve, signature)
    with replacing(target, overwrite) as temporary, quiet("absl", "tensorflow"):
        functions = _traced(serve, signature, served, with_xla=xla_signature)
        _write(functions, served, temporary, as_constants=fold)
        if warmup:
            _warm_up(functions["serve"], signature, temporary)
        if verify is True:
            verify_served(model, model, temporary, input_shape=input_shape)
        elif verify:
            verify(model, temporary, input_shape=input_shape)
    return target


def _next_version(directory: Path) -> int:
    if not directory.exists():
        return 1
    return 1 + max((int(child.name) for child in directory.iterdir() if child.name.isdecimal()), default=0)


def _traced(serve: Callable, signature: Sequence[Any], served: keras.Model, *, with_xla: bool) -> dict[str, Any]:
    """The functions to write, traced, by the names that `model.export` gives them, for keras.layers.TFSMLayer."""
    import tensorflow as tf

    def serve_without_changes(*tensors):
        # A layer that draws random numbers and does not use them changes the state of their generator.
        with keras.StatelessScope():
            return serve(*tensors)

    def traced(**options):
        function = tf.function(serve_without_changes, input_signature=signature, autograph=False, **options)
        function.get_concrete_function()
        return function

    functions = {"serve": traced()}
    if with_xla:
        # The user's own model has no other form.
        set_form(served, "keras")
        functions["serving_xla"] = traced(jit_compile=True)
    return functions


def _write(functions: Mapping[str, Any], served: keras.Model, path: Path, *, as_constants: bool) -> None:
    if as_constants and _can_be_constants(served, functions.values()):
        _save_constants({name: _frozen(traced, name == "serving_xla") for name, traced in functions.items()}, path)
    else:
        archive = keras.export.ExportArchive()
        archive.track(served)
        # Keras adds "serving_default" as another name of the first.
        for name, function in functions.items():
            archive.add_endpoint(name, function)
        archive.write_out(str(path), verbose=False)


def _can_be_constants(model: keras.Model, functions: Iterable[Any]) -> bool:
    """Whether the functions read nothing but variables, and these fit into a graph."""
    variables = {id(variable.value.handle) for variable in model.variables}
    resources = {
        id(tensor)
        for function in functions
        for tensor in function.get_concrete_function().captured_inputs
        if tensor.dtype == "resource"
    }
    size = sum(int(np.prod(variable.shape)) * variable.value.dtype.size for variable in model.variables)
    return resources <= variables and size * len(list(functions)) < _LARGEST_GRAPH


def _frozen(function, jit_compile):
    """A function of the same signature, with constants in place of its variables."""
    import tensorflow as tf

    concrete = function.get_concrete_function()
    frozen = convert_variables_to_constants(concrete)

    def serve(*tensors):
        return tf.nest.pack_sequence_as(concrete.structured_outputs, frozen(*tensors))

    compiled = True if jit_compile else None
    return tf.function(serve, input_signature=function.input_signature, autograph=False, jit_compile=compiled)


def _save_constants(functions, path):
    import tensorflow as tf

    module = tf.Module()
    for name, function in functions.items():
        setattr(module, name, function)
    # Custom gradients, such as that of silu, cannot be saved without variables.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    signatures = {"serving_default": functions["serve"], **functions}
    tf.saved_model.save(module, str(path), signatures=signatures, options=options)


def _warm_up(function, signature: Sequence[Any], path: Path) -> None:
    """Adds a request with the smallest sizes that the function takes."""
    import tensorflow as tf

    for sizes in sizes_to_try(spec.shape for spec in signature):
        request = {spec.name: _zeros(spec, sizes) for spec in signature}
        if sizes:
            try:
                function(*(tf.constant(array) for array in request.values()))
            except tf.errors.InvalidArgumentError:
                continue
        write_warm_up_requests(path, [request])
        return
    warnings.warn(
        "The SavedModel has no warm-up request, because the model takes none of the sizes that were tried. Write one "
        "with `write_warm_up_requests`.",
        stacklevel=3,
    )


def _zeros(spec, sizes):
    shape = with_fixed_sizes(spec.shape, 1, sizes)
    return np.full(shape, "" if spec.dtype == "string" else 0).astype(spec.dtype.as_numpy_dtype)
