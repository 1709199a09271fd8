"""The inference form of a normalization with its activation: what `fold` puts in the place of one."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_proxynorm.arguments import as_choice
from keras_proxynorm.compat import layers_inside
from keras_proxynorm.folding.forms import FORMS, Constants, normalize_and_activate
from keras_proxynorm.layers.activations import WithActivation
from keras_proxynorm.layers.base import ActivationLike
from keras_proxynorm.moments import computation_dtype

__all__ = ["FoldedNormalization", "set_form"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class FoldedNormalization(WithActivation, keras.layers.Layer):
    """``output_scale * activation(scale * y + offset) + output_offset`` of the normalized input ``y``, all constants.

    Made by `fold`, which sets its weights; they are not trainable. The layer is the inference form of
    `GroupNormProxy`, `LayerNormProxy` and `keras.layers.GroupNormalization`, and with ``groups=None``, where ``y`` is
    the input itself, of `ProxyActivation` and `keras.layers.BatchNormalization`.

    Args:
        groups: Number of groups of channels that share their statistics, or None for no normalization.
        axis: Integer, the channel axis.
        epsilon: Float, added to the variance of the input.
        activation: The activation, as in `GroupNormProxy`.
        constants: Which of ``"scale"``, ``"offset"``, ``"output_scale"`` and ``"output_offset"`` there are; the others
            change nothing, and are None. Defaults to all.
        reads_mask: Whether masked positions stay out of the statistics.

    Input shape: a float tensor of rank 2 or more. Output shape: the same.

    Raises:
        ValueError: If `constants` are not names of these four, or if the activation is not an elementwise function.

    Example:

    >>> import keras, keras_proxynorm
    >>> from keras_proxynorm.export import fold
    >>> model = keras.Sequential([keras.Input((8, 8, 4)), keras_proxynorm.GroupNormProxy(2, name="norm")])
    >>> fold(model).get_layer("norm")
    <FoldedNormalization name=norm, built=True>

    Reference:

    - [Labatie et al., 2021](https://arxiv.org/abs/2106.03743)
    """

    def __init__(
        self,
        groups: int | None,
        axis: int = -1,
        epsilon: float = 1e-3,
        activation: ActivationLike = None,
        constants: Sequence[str] = Constants._fields,
        reads_mask: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        # Statistics are float32 whatever the policy, so the input must not be cast to float16 on the way in.
        self.autocast = False
        self.groups = groups
        self.axis = axis
        self.epsilon = epsilon
        self.activation = activation
        if not set(constants) <= set(Constants._fields):
            raise ValueError(
                f"Argument `constants` must have names from {Constants._fields}. Received: constants={constants!r}"
            )
        self.constants = [name for name in Constants._fields if name in constants]
        self.reads_mask = reads_mask
        # Not in the config: an exporter sets it on the layers of a copy of its own, see `set_form`.
        self.form = "keras"
        self.scale = self.offset = self.output_scale = self.output_offset = None

    def build(self, input_shape):
        channels = input_shape[self.axis]
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={self.axis % len(input_shape): channels})

        for name in self.constants:
            initializer = "ones" if name.endswith("scale") else "zeros"
            weight = self.add_weight(
                shape=(channels,), name=name, initializer=initializer, trainable=False, autocast=False
            )
            setattr(self, name, weight)

    def call(self, inputs, mask=None):
        dtype = computation_dtype(inputs.dtype, self.variable_dtype)
        constants = Constants(**{name: ops.cast(getattr(self, name), dtype) for name in self.constants})
        outputs = normalize_and_activate(
            ops.cast(inputs, dtype),
            constants,
            self._elementwise.function,
            self.groups,
            self.axis % len(inputs.shape),
            self.epsilon,
            mask if self.reads_mask else None,
            self.form,
        )
        return ops.cast(outputs, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(self, inputs, mask=None):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "groups": self.groups,
            "axis": self.axis,
            "epsilon": self.epsilon,
            "activation": keras.activations.serialize(self.activation),
            "constants": list(self.constants),
            "reads_mask": self.reads_mask,
        }


def set_form(model: keras.Model, form: str) -> None:
    """Sets the form in which the folded normalizations of a model compute, wherever in it they are.

    Args:
        model: A model of the caller's own, which nobody else runs.
        form: One of `keras_proxynorm.folding.forms.FORMS`.
    """
    for layer in layers_inside(model):
        if isinstance(layer, FoldedNormalization):
            layer.form = as_choice("form", form, tuple(FORMS))
