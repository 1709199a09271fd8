"""How models with these layers are trained: which weights decay."""

from keras_proxynorm.training.weight_decay import exclude_norm_from_weight_decay

__all__ = ["exclude_norm_from_weight_decay"]
