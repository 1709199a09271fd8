"""Files to serve a model from: TensorFlow SavedModel and ONNX."""

from keras_proxynorm.export.folded_layers import FoldedNormalization
from keras_proxynorm.export.folding import FoldReport
from keras_proxynorm.export.folding import fold
from keras_proxynorm.export.onnx import export_onnx
from keras_proxynorm.export.saved_model import export_saved_model

__all__ = ["FoldReport", "FoldedNormalization", "export_onnx", "export_saved_model", "fold"]
