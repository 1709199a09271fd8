"""Files to serve a model from: TensorFlow SavedModel and ONNX."""

from keras_proxynorm.export.onnx import export_onnx
from keras_proxynorm.export.saved_model import export_saved_model

__all__ = ["export_onnx", "export_saved_model"]
