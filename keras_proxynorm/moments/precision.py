"""What a tensor is to a type checker, and in which precision moments and statistics are computed."""

from typing import Any, TypeAlias

import keras

__all__ = ["Tensor", "computation_dtype"]

# Of any backend.
Tensor: TypeAlias = Any


def computation_dtype(*dtypes: Any) -> str:
    """ "float64" if one of the dtypes is, else "float32".

    Not `keras.backend.result_type`: outside TensorFlow that turns float64 into float32.
    """
    return "float64" if "float64" in map(keras.backend.standardize_dtype, dtypes) else "float32"
