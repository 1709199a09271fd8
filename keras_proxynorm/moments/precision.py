"""In which precision moments and statistics are computed."""

import keras

__all__ = ["computation_dtype"]


def computation_dtype(*dtypes) -> str:
    """ "float64" if one of the dtypes is, else "float32".

    Not `keras.backend.result_type`: outside TensorFlow that turns float64 into float32.
    """
    return "float64" if "float64" in map(keras.backend.standardize_dtype, dtypes) else "float32"
