"""Puts other normalizations into a model that exists."""

from keras_proxynorm.surgery.replacing import replace_normalization
from keras_proxynorm.surgery.report import LayerReport, ReplacementReport

__all__ = ["LayerReport", "ReplacementReport", "replace_normalization"]
