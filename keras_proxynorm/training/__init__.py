"""How models with these layers are trained: which weights decay, where proxies are, sharpness-aware minimization."""

from keras_proxynorm.training.proxies import CalibrateProxies
from keras_proxynorm.training.proxies import calibrate_proxies
from keras_proxynorm.training.sharpness_aware import SharpnessAwareMinimization
from keras_proxynorm.training.weight_decay import exclude_norm_from_weight_decay

__all__ = ["CalibrateProxies", "SharpnessAwareMinimization", "calibrate_proxies", "exclude_norm_from_weight_decay"]
