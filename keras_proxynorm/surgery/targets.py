"""What can be put in the place of a normalization: names, factories, and how many groups."""

import functools
import inspect
from collections.abc import Callable

import keras

from keras_proxynorm import baselines
from keras_proxynorm.layers import GroupNormProxy
from keras_proxynorm.layers import LayerNormProxy
from keras_proxynorm.layers.base import NormalizationLayer

__all__ = ["TARGETS", "Target", "choose_groups"]


def _with_own_nonlinearity(layer_class):
    """A factory of layers that have a nonlinearity of their own in the place of the model's activation."""

    def make(*, activation, **kwargs):
        return layer_class(nonlinearity=activation is not None, **kwargs)

    parameters = [p for p in _parameters(layer_class) if p.name != "nonlinearity"]
    activation = inspect.Parameter("activation", inspect.Parameter.KEYWORD_ONLY)
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.kind != p.VAR_KEYWORD]
    variable = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    make.__signature__ = inspect.Signature([*parameters, activation, variable])  # type: ignore[attr-defined]
    # Without the nonlinearity, that of EvoNorm is but a scale and an offset.
    make.normalizes_alone = layer_class is baselines.FilterResponseNormalization  # type: ignore[attr-defined]
    return make


def _parameters(factory):
    """The parameters of a factory. Our layers hand what they do not name on to the class they are derived from."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except ValueError as error:  # callables that are not written in Python
        raise ValueError(f"Argument `to` must be a function with a signature. Received: to={factory!r}") from error
    if inspect.isclass(factory) and issubclass(factory, NormalizationLayer):
        named = {parameter.name for parameter in parameters}
        inherited = list(inspect.signature(NormalizationLayer).parameters.values())
        parameters = [*(p for p in inherited if p.name not in named and p.kind != p.VAR_KEYWORD), *parameters]
        # A layer that contains a linear layer has the channel axis of that.
        parameters = [p for p in parameters if p.name != "axis" or "layer" not in named]
    return parameters


TARGETS: dict[str, Callable[..., keras.layers.Layer]] = {
    "group_norm_proxy": GroupNormProxy,
    "layer_norm_proxy": LayerNormProxy,
    "group_norm": keras.layers.GroupNormalization,
    "layer_norm": functools.partial(keras.layers.GroupNormalization, groups=1),
    "instance_norm": functools.partial(keras.layers.GroupNormalization, groups=-1),
    "ghost_batch_norm": baselines.GhostBatchNormalization,
    "instance_enhancement_batch_norm": baselines.InstanceEnhancementBatchNormalization,
    "batch_group_norm": baselines.BatchGroupNormalization,
    "cross_iteration_batch_norm": baselines.CrossIterationBatchNormalization,
    "conv_norm": baselines.ConvolutionalNormalization,
    "variance_norm": baselines.VarianceNormalization,
    "filter_response_norm": _with_own_nonlinearity(baselines.FilterResponseNormalization),
    "evonorm_s0": _with_own_nonlinearity(baselines.EvoNormS0),
    "evonorm_b0": _with_own_nonlinearity(baselines.EvoNormB0),
    "weight_standardization": baselines.WeightStandardization,
    "weight_normalization": baselines.WeightNormalization,
}


_DECIDED_BY_THE_MODEL = {"activation", "axis", "channels", "layer", "name", "trainable"}


class Target:
    """A factory of layers and which of the arguments on offer it takes.

    Args:
        to: A name in `TARGETS`, or a factory.
        layer_kwargs: Further keyword arguments for the factory.
    """

    def __init__(self, to: str | Callable[..., keras.layers.Layer], layer_kwargs: dict):
        if not (callable(to) or (isinstance(to, str) and to in TARGETS)):
            raise ValueError(
                f"Argument `to` must be one of {', '.join(map(repr, sorted(TARGETS)))}, or a function that makes a "
                f"layer. Received: to={to!r}"
            )
        self.factory = TARGETS[to] if isinstance(to, str) else to
        self.name = to if isinstance(to, str) else getattr(to, "__name__", type(to).__name__)
        self.layer_kwargs = layer_kwargs
        parameters = _parameters(self.factory)
        bound = self.factory.keywords if isinstance(self.factory, functools.partial) else {}
        self._named = {
            parameter.name
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        } - set(bound)
        self._takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
        if "activation" in bound:
            raise ValueError(
                "Argument `to` must not fix the activation, which comes from the model. "
                f"Received: to={to!r} with activation={bound['activation']!r}"
            )
        for name in ("name", "dtype"):
            if not self._takes_any and name not in self._named:
                raise ValueError(
                    f"Argument `to` must be a function that takes the keyword argument `{name}` and hands it on to the "
                    f"layer. Received: to={to!r} with the arguments {sorted(self._named)}"
                )
        # What a class of layers takes besides are the arguments of keras.layers.Layer.
        makes_layers = inspect.isclass(getattr(self.factory, "func", self.factory))
        allowed = (self._named | {"dtype", "autocast"} if makes_layers else self._named) - _DECIDED_BY_THE_MODEL
        for name in layer_kwargs:
            if name not in allowed and (makes_layers or not self._takes_any or name in _DECIDED_BY_THE_MODEL):
                raise ValueError(
                    f"Keyword argument `{name}` is not one that can be handed on to {self.name}; these are "
                    f"{sorted(allowed)}. Received: {name}={layer_kwargs[name]!r}"
                )

    @property
    def fuses(self) -> bool:
        """Whether the layers contain the activation."""
        return "activation" in self._named

    @property
    def normalizes_alone(self) -> bool:
        """Whether the layers normalize, too, if they do not contain the activation."""
        return getattr(self.factory, "normalizes_alone", True)

    @property
    def contains_linear(self) -> bool:
        """Whether the layers contain the linear layer in front of the normalization."""
        return "layer" in self._named

    def why_unfit(self, layer: keras.layers.Layer) -> str | None:
        """Why a linear layer cannot be contained; None if it can, as far as the factory tells."""
        why_unfit = getattr(self.factory, "why_unfit", None)
        return None if why_unfit is None else why_unfit(layer)

    def make(self, arguments: dict) -> keras.layers.Layer:
        """Calls the factory with those of `arguments` that it takes."""
        taken = {
            key: value
            for key, value in arguments.items()
            if key in self._named or (key in ("name", "dtype") and self._takes_any)
        }
        layer = self.factory(**{**taken, **self.layer_kwargs})
        if not isinstance(layer, keras.layers.Layer) or layer.name != arguments["name"]:
            raise ValueError(
                "Argument `to` must be a function that returns a new Keras layer with the name it is given, "
                f"{arguments['name']!r}. Received: to={self.factory!r}, which returned {layer!r}"
            )
        return layer


def choose_groups(channels: int, groups: int = 32, min_channels_per_group: int = 4) -> int:
    """The largest divisor of `channels` up to `groups` with `min_channels_per_group` channels in a group, else 1.

    One channel in a group would be instance normalization, which is identically 0 over a 1x1 map, and 32 divides few of
    the widths that are in use.

    >>> choose_groups(64), choose_groups(48), choose_groups(44), choose_groups(11)
    (16, 12, 11, 1)
    """
    fitting = (n for n in range(groups, 0, -1) if channels % n == 0 and channels // n >= min_channels_per_group)
    return next(fitting, 1)
