"""What all layers of the package share: axis, gamma and beta, their arguments, config and error messages."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
from keras import constraints, initializers, ops, regularizers

from keras_proxynorm.arguments import argument_error, as_boolean, as_integer
from keras_proxynorm.compat import own_variables
from keras_proxynorm.layers.rematerialization import WithRematerialization
from keras_proxynorm.moments import Tensor, computation_dtype

__all__ = [
    "ActivationLike",
    "ConstraintLike",
    "InitializerLike",
    "NormalizationLayer",
    "RegularizerLike",
    "Shape",
    "arguments_passed_on",
    "values_per_group",
]

# A layer is a callable, too.
ActivationLike: TypeAlias = str | Callable | dict | None
InitializerLike: TypeAlias = str | Callable | dict
RegularizerLike: TypeAlias = str | Callable | dict | None
ConstraintLike: TypeAlias = str | Callable | dict | None
Shape: TypeAlias = Sequence[int | None]


def arguments_passed_on(variables: dict[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """The arguments that a constructor passes on to that of its parent, from its `locals()` at the start."""
    own = {name: value for name, value in variables.items() if name not in ("self", "__class__", "kwargs", *without)}
    return {**own, **variables["kwargs"]}


def values_per_group(shape: Shape, groups: int) -> int | None:
    """How many values of a sample are in each group of channels; None if a size is unknown."""
    sizes = [size for size in shape[1:] if size is not None]
    return math.prod(sizes) // groups if len(sizes) == len(shape) - 1 else None


class NormalizationLayer(WithRematerialization):
    """A layer with a channel axis, and the weights `gamma` and `beta` of each channel.

    Not meant to be used directly; subclasses have a `call`.
    """

    # What becomes of values that share their statistics with no other; see `values_per_statistic`.
    effect_on_single_values = ""

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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Statistics are float32 whatever the policy, so the input must not be cast to float16 on the way in.
        self.autocast = False
        self.supports_masking = True
        self.axis = as_integer("axis", axis, "an integer, the channel axis")
        self.center = as_boolean("center", center)
        self.scale = as_boolean("scale", scale)
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.gamma: Any = None
        self.beta: Any = None

    def build(self, input_shape: Shape) -> None:
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
        if self.values_per_statistic(input_shape) == 1:
            warnings.warn(
                f"{type(self).__name__} '{self.name}' has inputs of shape {tuple(input_shape)}, where no two values "
                f"share their statistics: {self.effect_on_single_values}",
                stacklevel=2,
            )
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={axis: channels})
        self._add_affine(channels)
        super().build(input_shape)

    def values_per_statistic(self, input_shape: Shape) -> int | None:
        """How many values of one sample share a mean or a variance, for inputs of a shape.

        Returns:
            None if the statistics are not of single samples, or if a size that it depends on is unknown.
        """
        return None

    def _add_affine(self, channels):
        if self.scale:
            self.gamma = self._add_parameter("gamma", channels)
        if self.center:
            self.beta = self._add_parameter("beta", channels)

    def _add_parameter(self, name, *shape, trainable=True):
        """A weight whose initializer, regularizer and constraint are the layer's attributes of that name."""
        return self.add_weight(
            shape=shape,
            name=name,
            initializer=getattr(self, f"{name}_initializer"),
            regularizer=getattr(self, f"{name}_regularizer", None),
            constraint=getattr(self, f"{name}_constraint", None),
            trainable=trainable,
            autocast=False,
        )

    def _affine(self, dtype) -> tuple[Any, Any]:
        """`gamma` and `beta` in the dtype of a computation; None where there is none."""
        gamma, beta = (None if weight is None else ops.cast(weight, dtype) for weight in (self.gamma, self.beta))
        return gamma, beta

    def _check_channels(self, input_shape, channels):
        """Raises a ValueError if the layer cannot have this many channels."""

    def _channel_axis(self, shape):
        rank = len(shape)
        if rank < 2:
            raise ValueError(
                "The inputs must have a batch axis and a channel axis, that is rank 2 or more. "
                f"Received: inputs.shape={tuple(shape)}"
            )
        if not -rank < self.axis < rank or self.axis == 0:
            raise argument_error(
                "axis",
                self.axis,
                f"the index of the channel axis, from 1 to {rank - 1} or from {1 - rank} to -1 for inputs of rank "
                f"{rank}; axis 0 is the batch",
                f"inputs.shape={tuple(shape)}",
            )
        return self.axis % rank

    def _channels(self, shape):
        """The number of channels of inputs of a shape."""
        return shape[self._channel_axis(shape)]

    def _check_dtype(self, inputs):
        if not keras.backend.is_float_dtype(inputs.dtype):
            raise ValueError(
                f"The inputs of {type(self).__name__} must have a float dtype; cast or rescale integers first. "
                f"Received: inputs.dtype={keras.backend.standardize_dtype(inputs.dtype)}"
            )

    def _for_statistics(self, inputs):
        """The inputs in the dtype that statistics are computed in; a ValueError if they are no floats."""
        self._check_dtype(inputs)
        return ops.cast(inputs, computation_dtype(inputs.dtype, self.variable_dtype))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        self._channel_axis(input_shape)
        return input_shape

    def compute_output_spec(self, inputs: Tensor, **kwargs: Any) -> keras.KerasTensor:
        self._check_dtype(inputs)
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=self.compute_dtype)

    def save_own_variables(self, store: dict) -> None:
        for variable in own_variables(self):
            store[variable.name] = variable

    def load_own_variables(self, store: dict) -> None:
        # By name: a BatchNormalization stores "0", "1", ..., and without gamma and beta it has two vectors, as many as
        # a plain norm here. By position its moving statistics would become gamma and beta.
        variables = own_variables(self)
        expected, received = {variable.name for variable in variables}, set(store.keys())
        if expected != received:
            raise ValueError(
                f"Layer '{self.name}' ({type(self).__name__}) expected the variables {sorted(expected)}, but the file "
                f"has {sorted(received) or 'none'} in its place. Weights of another kind of layer cannot be loaded "
                "into it; carry them over with `set_weights` if they mean the same."
            )
        for variable in variables:
            variable.assign(store[variable.name])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "axis": self.axis,
            "center": self.center,
            "scale": self.scale,
            **self._config_of_parameter("beta"),
            **self._config_of_parameter("gamma"),
        }

    def _config_of_parameter(self, name):
        """What `_add_parameter` needs."""
        return {
            f"{name}_initializer": initializers.serialize(getattr(self, f"{name}_initializer")),
            f"{name}_regularizer": regularizers.serialize(getattr(self, f"{name}_regularizer")),
            f"{name}_constraint": constraints.serialize(getattr(self, f"{name}_constraint")),
        }
