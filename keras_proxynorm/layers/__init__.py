"""The Keras layers: weights, configs and error messages around the functions of kernels and moments."""

from keras_proxynorm.layers.group_norm_proxy import GroupNormProxy
from keras_proxynorm.layers.layer_norm_proxy import LayerNormProxy
from keras_proxynorm.layers.proxy_activation import ProxyActivation

__all__ = ["GroupNormProxy", "LayerNormProxy", "ProxyActivation"]
