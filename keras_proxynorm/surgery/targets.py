"""What can be put in the place of a normalization: names, factories, and how many groups."""

import functools
import inspect
from collections.abc import Callable

import keras

from keras_proxynorm.layers import GroupNormProxy
from keras_proxynorm.layers import LayerNormProxy

__all__ = ["TARGETS", "Target", "choose_groups"]

TARGETS: dict[str, Callable[..., keras.layers.Layer]] = {
    "group_norm_proxy": GroupNormProxy,
    "layer_norm_proxy": LayerNormProxy,
    "group_norm": keras.layers.GroupNormalization,
    "layer_norm": functools.partial(keras.layers.GroupNormalization, groups=1),
}


_DECIDED_BY_THE_MODEL = {"activation", "axis", "channels", "name", "trainable"}


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
    def has_groups(self) -> bool:
        return "groups" in self._named

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


def _parameters(factory):
    try:
        return inspect.signature(factory).parameters.values()
    except ValueError as error:  # callables that are not written in Python
        raise ValueError(f"Argument `to` must be a function with a signature. Received: to={factory!r}") from error


def choose_groups(channels: int, groups: int = 32, min_channels_per_group: int = 4) -> int:
    """The largest divisor of `channels` up to `groups` with `min_channels_per_group` channels in a group, else 1.

    One channel in a group would be instance normalization, which is identically 0 over a 1x1 map, and 32 divides few of
    the widths that are in use.

    >>> choose_groups(64), choose_groups(48), choose_groups(44), choose_groups(11)
    (16, 12, 11, 1)
    """
    fitting = (n for n in range(groups, 0, -1) if channels % n == 0 and channels // n >= min_channels_per_group)
    return next(fitting, 1)
