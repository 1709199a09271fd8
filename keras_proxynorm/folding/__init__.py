"""The inference form of a model: normalizations as constants, which the layers around them absorb."""

from keras_proxynorm.folding.folded_normalization import FoldedNormalization
from keras_proxynorm.folding.folding import FoldReport, fold

__all__ = ["FoldReport", "FoldedNormalization", "fold"]
