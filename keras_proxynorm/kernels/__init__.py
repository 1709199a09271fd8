"""Pure tensor functions: group statistics, and the normalize and activate steps."""

from keras_proxynorm.kernels.proxy_norm import (
    affine,
    affine_and_activate,
    group_normalize,
    group_normalize_and_activate,
    normalize,
    proxy_moments,
)
from keras_proxynorm.kernels.reductions import reduction, set_reduction
from keras_proxynorm.kernels.statistics import group_moments

__all__ = [
    "affine",
    "affine_and_activate",
    "group_moments",
    "group_normalize",
    "group_normalize_and_activate",
    "normalize",
    "proxy_moments",
    "reduction",
    "set_reduction",
]
