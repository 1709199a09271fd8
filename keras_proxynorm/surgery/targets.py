"""What can be put in the place of a normalization: names, factories, and how many groups."""

import functools
import inspect
from collections.abc import Callable

import keras

from keras_proxynorm import baselines
from keras_proxynorm.layers import GroupNormProxy, LayerNormProxy

__all__ = ["TARGETS", "Target", "choose_groups"]


def _with_own_nonlinearity(layer_class):
    """A factory of layers that have a nonlinearity of their own in the place of the model's activation."""

    def make(*, activation, **kwargs):
        return layer_class(nonlinearity=activation is not None, **kwargs)

    names = [*(name for name in _parameters_of_class(layer_class) if name != "nonlinearity"), "activation"]
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    variable = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    make.__signature__ = inspect.Signature([*parameters, variable])  # type: ignore[attr-defined]
    # Without the nonlinearity, EvoNorm is nothing but gamma and beta.
    make.has_own_nonlinearity = True  # type: ignore[attr-defined]
    make.normalizes_alone = layer_class is baselines.FilterResponseNormalization  # type: ignore[attr-defined]
    return make


def _parameters(factory):
    """The parameters that a factory takes, by name, and whether it takes any others."""
    if isinstance(factory, functools.partial):
        parameters, takes_any = _parameters(factory.func)
        return {name: x for name, x in parameters.items() if name not in factory.keywords}, takes_any
    if inspect.isclass(factory) and issubclass(factory, keras.layers.Layer):
        return _parameters_of_class(factory), True
    try:
        signature = inspect.signature(factory)
    except ValueError as error:  # callables that are not written in Python
        raise ValueError(f"Argument `to` must be a function with a signature. Received: to={factory!r}") from error
    return _named(signature), any(x.kind == x.VAR_KEYWORD for x in signature.parameters.values())


def _parameters_of_class(cls):
    """The parameters of a class of layers, and of the classes that it hands its other keyword arguments on to."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in inspect.getmro(cls):
        if base is keras.layers.Layer:
            break
        if "__init__" in vars(base):
            signature = inspect.signature(base)
            parameters = {**_named(signature), **parameters}
            if all(x.kind != x.VAR_KEYWORD for x in signature.parameters.values()):
                break
    if issubclass(cls, LayerNormProxy):
        del parameters["groups"]  # it has one, and refuses others
    if "layer" in parameters:
        # A layer that absorbs a linear layer has the channel axis of that.
        parameters.pop("axis", None)
    return parameters


def _named(signature):
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: x for name, x in signature.parameters.items() if x.kind in kinds}


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
        parameters, self._takes_any = _parameters(self.factory)
        bound = self.factory.keywords if isinstance(self.factory, functools.partial) else {}
        self._named = set(parameters)
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
        """Whether the layers have an activation."""
        return "activation" in self._named

    @property
    def normalizes_alone(self) -> bool:
        """Whether the layers normalize, too, without an activation."""
        return getattr(self.factory, "normalizes_alone", True)

    @property
    def has_own_nonlinearity(self) -> bool:
        """Whether a nonlinearity of the layers takes the place of the activation."""
        return getattr(self.factory, "has_own_nonlinearity", False)

    @property
    def contains_linear(self) -> bool:
        """Whether the layers absorb the linear layer before the normalization."""
        return "layer" in self._named

    def unsupported_reason(self, layer: keras.layers.Layer) -> str | None:
        """Why a linear layer cannot be absorbed; None if it can, as far as the factory tells."""
        reason = getattr(self.factory, "unsupported_because", None)
        return None if reason is None else reason(layer)

    @staticmethod
    def call_arguments(layer: keras.layers.Layer) -> set[str]:
        """The names of the arguments that a call of a layer takes."""
        return set(inspect.signature(layer.call).parameters)

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
