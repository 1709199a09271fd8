"""Proxy Normalization for Keras 3: layer and group norm that keep channels normalized without looking at the batch."""

import os
import warnings

import keras_proxynorm.folding  # noqa: F401  (it registers the layer of folded models, for files that have it)
from keras_proxynorm.kernels import reduction, set_reduction
from keras_proxynorm.layers import GroupNormProxy, LayerNormProxy, ProxyActivation
from keras_proxynorm.moments import activation_moments, register_activation
from keras_proxynorm.surgery import replace_normalization
from keras_proxynorm.training import exclude_norm_from_weight_decay

__all__ = [
    "GroupNormProxy",
    "LayerNormProxy",
    "ProxyActivation",
    "activation_moments",
    "exclude_norm_from_weight_decay",
    "reduction",
    "register_activation",
    "replace_normalization",
    "set_reduction",
]

__version__ = "0.1.0"

if os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
    warnings.warn(
        "TF_USE_LEGACY_KERAS is set, so `tf.keras` is Keras 2, and the layers of keras_proxynorm are Keras 3 layers: "
        "they cannot be put into tf.keras models. Use `import keras` in place of `tf.keras`, or unset "
        "TF_USE_LEGACY_KERAS.",
        stacklevel=2,
    )
