"""Training of models with these layers: weight decay, calibration of proxies, sharpness-aware minimization."""

from keras_proxynorm.training.proxies import CalibrateProxies, calibrate_proxies
from keras_proxynorm.training.sharpness_aware import SharpnessAwareMinimization
from keras_proxynorm.training.weight_decay import exclude_norm_from_weight_decay

__all__ = ["CalibrateProxies", "SharpnessAwareMinimization", "calibrate_proxies", "exclude_norm_from_weight_decay"]
