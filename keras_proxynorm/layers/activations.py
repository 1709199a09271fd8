"""Activations as layers keep them: such that a file can hold them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras

from keras_proxynorm.arguments import argument_error
from keras_proxynorm.moments import ElementwiseActivation, resolve_activation

__all__ = ["PartialActivation", "WithActivation"]


@keras.saving.register_keras_serializable(package="keras_proxynorm")
class PartialActivation(functools.partial):
    """A function with keyword arguments, as `functools.partial`, which Keras cannot save."""

    def get_config(self) -> dict[str, Any]:
        return {
            "function": keras.activations.serialize(self.func),
            "arguments": keras.saving.serialize_keras_object(self.keywords),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PartialActivation":
        arguments = keras.saving.deserialize_keras_object(config["arguments"])
        return cls(keras.activations.get(config["function"]), **arguments)


class WithActivation:
    """The property `activation` of layers with an elementwise activation, which a file can hold."""

    _activation: Any
    _resolved: ElementwiseActivation

    @property
    def activation(self) -> Callable:
        """The activation, as a function or a layer. Assigning another one takes effect at the next call or tracing."""
        return self._activation

    @activation.setter
    def activation(self, activation: Any) -> None:
        self._set_activation(activation)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            # On PyTorch a layer is a Module, and Modules would be assigned past the property.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def _elementwise(self) -> ElementwiseActivation:
        # The attributes of an activation layer of Keras may change. All else is looked at once: functions of libraries
        # stay as they are, and others are evaluated as they are.
        is_layer = isinstance(self._activation, keras.layers.Layer)
        return resolve_activation(self._activation) if is_layer and self._resolved.is_standard else self._resolved

    def _set_activation(self, activation):
        resolved = resolve_activation(activation)
        # Past Keras, which would keep every layer that was assigned, and takes none after `build`.
        object.__setattr__(self, "_activation", _saved_form(activation))
        self._resolved = resolved


def _saved_form(activation):
    """The function or the layer of an activation, in a form that can be saved; a ValueError if there is none."""
    function = keras.activations.get(activation)
    if isinstance(function, functools.partial) and not function.args and _has_a_name(function.func):
        function = PartialActivation(function.func, **function.keywords)
    if not _can_be_saved(function):
        raise argument_error(
            "activation",
            activation,
            "an activation that can be saved: write it as a function of one tensor, and register that with "
            "keras.saving.register_keras_serializable",
        )
    return function


def _has_a_name(function):
    return inspect.isfunction(function) and function.__name__ != "<lambda>"


def _can_be_saved(function):
    if inspect.isfunction(function):
        return True
    # Keras writes the name of a method, but cannot find a method by its name. Of a variable it writes the value.
    if inspect.ismethod(function) or any(hasattr(x, "assign") for x in getattr(function, "keywords", {}).values()):
        return False
    try:
        keras.activations.serialize(function)
    except Exception:  # The config is the user's.
        return False
    return True
