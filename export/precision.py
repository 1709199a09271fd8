"""The dtypes that a model computes in, and mixed precision as float32, which every runtime of ONNX computes in."""

from collections.abc import Sequence

import keras

from keras_proxynorm.compat import layers_inside
from keras_proxynorm.graph.reading import is_functional, is_sequential, read_graphs
from keras_proxynorm.graph.rewriting import clone

__all__ = ["HALVES", "computes_in", "in_float32"]

HALVES = ("bfloat16", "float16")


def computes_in(model: keras.Model, dtypes: Sequence[str]) -> bool:
    """Whether any layer of a model computes in one of `dtypes`."""
    return any(layer.compute_dtype in dtypes for layer in layers_inside(model))


def in_float32(served: keras.Model, model: keras.Model) -> keras.Model:
    """`served` with the policy float32 in place of mixed precision.

    Args:
        served: The model that an export will contain: `model` itself, or a copy that the export owns, which is changed.
        model: The user's model, which is never changed.

    Raises:
        ValueError: If a layer has a policy of mixed precision, and the model cannot be copied; or if anything would
            stay in bfloat16, which no runtime computes in.
    """
    mixed = any(map(_has_mixed_precision, layers_inside(served)))
    if mixed and served is model:
        if not (is_functional(model) or is_sequential(model)):
            raise ValueError(
                "Argument `model` must be functional or sequential, so that a copy of it can compute in float32, where "
                "it computes in half precision. Make the model again under the policy 'float32' and load its weights "
                f"there with `load_weights`, or use export_saved_model. Received: model={model!r}"
            )
        served = clone(read_graphs(model)).model
    for layer in filter(_has_mixed_precision, layers_inside(served)):
        layer.dtype_policy = "float32"
    inputs = getattr(model, "inputs", None) or ()
    if computes_in(served, ["bfloat16"]) or any(tensor.dtype == "bfloat16" for tensor in inputs):
        raise ValueError(
            "Argument `model` must have weights and inputs of another dtype than bfloat16, which runtimes of ONNX do "
            "not compute in. Make the model again under the policy 'float32' or 'mixed_bfloat16' and load its weights "
            f"there with `load_weights`, or use export_saved_model. Received: model={model!r}"
        )
    return served


def _has_mixed_precision(layer):
    # Policies of quantized layers and maps of policies are not touched.
    return type(layer.dtype_policy) is keras.dtype_policies.DTypePolicy and (
        layer.compute_dtype in HALVES and layer.variable_dtype == "float32"
    )
