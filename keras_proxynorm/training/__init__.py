"""How models with these layers are trained: which weights decay, and sharpness-aware minimization."""

from keras_proxynorm.training.sharpness_aware import SharpnessAwareMinimization
from keras_proxynorm.training.weight_decay import exclude_norm_from_weight_decay

__all__ = ["SharpnessAwareMinimization", "exclude_norm_from_weight_decay"]
