"""The normalizations that the papers around Proxy Normalization name, as Keras layers with the same conventions."""

from keras_proxynorm.baselines.batch_group import BatchGroupNormalization
from keras_proxynorm.baselines.convolutional import ConvolutionalNormalization
from keras_proxynorm.baselines.cross_iteration import CrossIterationBatchNormalization
from keras_proxynorm.baselines.evonorm_b0 import EvoNormB0
from keras_proxynorm.baselines.evonorm_s0 import EvoNormS0
from keras_proxynorm.baselines.example_weighing import choose_inference_example_weight
from keras_proxynorm.baselines.filter_response import FilterResponseNormalization
from keras_proxynorm.baselines.ghost_batch import GhostBatchNormalization, L2TowardOne
from keras_proxynorm.baselines.instance_enhancement import InstanceEnhancementBatchNormalization
from keras_proxynorm.baselines.variance import VarianceNormalization
from keras_proxynorm.baselines.weight_normalization import WeightNormalization
from keras_proxynorm.baselines.weight_standardization import WeightStandardization

__all__ = [
    "BatchGroupNormalization",
    "ConvolutionalNormalization",
    "CrossIterationBatchNormalization",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNormalization",
    "GhostBatchNormalization",
    "InstanceEnhancementBatchNormalization",
    "L2TowardOne",
    "VarianceNormalization",
    "WeightNormalization",
    "WeightStandardization",
    "choose_inference_example_weight",
]
