"""Files to serve a model from: TensorFlow SavedModel and ONNX."""

from keras_proxynorm.export.onnx import export_onnx
from keras_proxynorm.export.saved_model import export_saved_model
from keras_proxynorm.export.verification import Verification, VerificationError, verify
from keras_proxynorm.export.warm_up import write_warm_up_requests
from keras_proxynorm.folding.folded_normalization import FoldedNormalization
from keras_proxynorm.folding.folding import FoldReport, fold

__all__ = [
    "FoldReport",
    "FoldedNormalization",
    "Verification",
    "VerificationError",
    "export_onnx",
    "export_saved_model",
    "fold",
    "verify",
    "write_warm_up_requests",
]
