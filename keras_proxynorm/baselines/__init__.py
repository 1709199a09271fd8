"""The normalizations that the papers around Proxy Normalization name, as Keras layers with the same conventions."""

from keras_proxynorm.baselines.weight_normalization import WeightNormalization
from keras_proxynorm.baselines.weight_standardization import WeightStandardization

__all__ = ["WeightNormalization", "WeightStandardization"]
