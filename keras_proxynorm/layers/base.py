"""What all layers of the package share: axis, scale and offset, their arguments, config and error messages."""

from collections.abc import Callable
from typing import Any
from typing import TypeAlias

import keras
from keras import constraints
from keras import initializers
from keras import ops
from keras import regularizers

from keras_proxynorm.arguments import as_integer

__all__ = [
    "ActivationLike",
    "ConstraintLike",
    "InitializerLike",
    "NormalizationLayer",
    "RegularizerLike",
]

# A layer is a callable, too.
ActivationLike: TypeAlias = str | Callable | dict | None
InitializerLike: TypeAlias = str | Callable | dict
RegularizerLike: TypeAlias = str | Callable | dict | None
ConstraintLike: TypeAlias = str | Callable | dict | None


class NormalizationLayer(keras.layers.Layer):
    """A layer with a channel axis, and a scale `gamma` and an offset `beta` for each channel.

    Not meant to be used directly; subclasses have a `call`.
    """

    def __init__(
        self,
        axis: int = -1,
        center: bool = True,
        scale: bool = True,
        beta_initializer: InitializerLike = "zeros",
        gamma_initializer: InitializerLike = "ones",
        beta_regularizer: RegularizerLike = None,
        gamma_regularizer: RegularizerLike = None,
        beta_constraint: ConstraintLike = None,
        gamma_constraint: ConstraintLike = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        # Statistics are float32 whatever the policy, so the input must not be cast to float16 on the way in.
        self.autocast = False
        self.axis = as_integer("axis", axis, "an integer, the channel axis")
        self.center = center
        self.scale = scale
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.gamma = None
        self.beta = None

    def build(self, input_shape):
        if any(isinstance(size, (list, tuple)) for size in input_shape):
            raise ValueError(f"The inputs must be one tensor, not several. Received: inputs of shapes {input_shape}")
        axis = self._channel_axis(input_shape)
        channels = input_shape[axis]
        if channels is None:
            raise ValueError(
                f"The channel axis of the inputs must have a known size, but axis={self.axis} of the shape "
                f"{tuple(input_shape)} has none."
            )
        self._check_channels(input_shape, channels)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={axis: channels})
        self._add_affine(channels)
        super().build(input_shape)

    def _add_affine(self, channels):
        if self.scale:
            self.gamma = self.add_weight(
                shape=(channels,),
                name="gamma",
                initializer=self.gamma_initializer,
                regularizer=self.gamma_regularizer,
                constraint=self.gamma_constraint,
                autocast=False,
            )
        if self.center:
            self.beta = self.add_weight(
                shape=(channels,),
                name="beta",
                initializer=self.beta_initializer,
                regularizer=self.beta_regularizer,
                constraint=self.beta_constraint,
                autocast=False,
            )

    def _affine(self, dtype):
        """`gamma` and `beta` in the dtype of a computation; None where there is none."""
        return tuple(None if weight is None else ops.cast(weight, dtype) for weight in (self.gamma, self.beta))

    def _check_channels(self, input_shape, channels):
        """Raises a ValueError if the layer cannot have this many channels."""

    def _channel_axis(self, input_shape):
        rank = len(input_shape)
        if rank < 2:
            raise ValueError(
                "The inputs must have a batch axis and a channel axis, that is rank 2 or more. "
                f"Received: inputs.shape={tuple(input_shape)}"
            )
        if not -rank < self.axis < rank or self.axis == 0:
            raise ValueError(
                f"Argument `axis` must be the index of the channel axis, from 1 to {rank - 1} or from {1 - rank} to -1 "
                f"for inputs of rank {rank}; axis 0 is the batch. "
                f"Received: axis={self.axis}, inputs.shape={tuple(input_shape)}"
            )
        return self.axis % rank

    def _check_dtype(self, inputs):
        if not keras.backend.is_float_dtype(inputs.dtype):
            raise ValueError(
                f"The inputs of {type(self).__name__} must have a float dtype; cast or rescale integers first. "
                f"Received: inputs.dtype={keras.backend.standardize_dtype(inputs.dtype)}"
            )

    def compute_output_shape(self, input_shape):
        self._channel_axis(input_shape)
        return input_shape

    def compute_output_spec(self, inputs, **kwargs):
        self._check_dtype(inputs)
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=self.compute_dtype)

    def save_own_variables(self, store):
        for variable in self._own_variables():
            store[variable.name] = variable

    def load_own_variables(self, store):
        # By name: a BatchNormalization stores "0", "1", ..., and without a scale and an offset it has two vectors,
        # as many as a plain norm here. By position its moving statistics would become gamma and beta.
        variables = self._own_variables()
        expected, received = {variable.name for variable in variables}, set(store.keys())
        if expected != received:
            raise ValueError(
                f"Layer '{self.name}' ({type(self).__name__}) expected the variables {sorted(expected)}, but the file "
                f"has {sorted(received) or 'none'} in its place. Weights of another kind of layer cannot be loaded "
                "into it; carry them over with `set_weights` if they mean the same."
            )
        for variable in variables:
            variable.assign(store[variable.name])

    def _own_variables(self):
        return [*self._trainable_variables, *self._non_trainable_variables]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "axis": self.axis,
                "center": self.center,
                "scale": self.scale,
                "beta_initializer": initializers.serialize(self.beta_initializer),
                "gamma_initializer": initializers.serialize(self.gamma_initializer),
                "beta_regularizer": regularizers.serialize(self.beta_regularizer),
                "gamma_regularizer": regularizers.serialize(self.gamma_regularizer),
                "beta_constraint": constraints.serialize(self.beta_constraint),
                "gamma_constraint": constraints.serialize(self.gamma_constraint),
            }
        )
        return config
