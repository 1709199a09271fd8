"""Checks of arguments that several parts of the package share: each returns the value, or raises a ValueError."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

__all__ = [
    "argument_error",
    "as_boolean",
    "as_choice",
    "as_epsilon",
    "as_fraction",
    "as_groups",
    "as_integer",
    "as_nonnegative",
    "as_nonnegative_integer",
    "as_positive",
    "as_positive_integer",
    "as_positive_integer_or_none",
    "check_built_model",
    "check_divides_channels",
]


def argument_error(name: str, value: Any, expected: str, also_received: str = "") -> ValueError:
    """The error for an argument that is not as expected; `also_received` is what else the user must see."""
    received = f"{name}={value!r}" + (also_received and f", {also_received}")
    return ValueError(f"Argument `{name}` must be {expected}. Received: {received}")


def as_integer(name: str, value: Any, expected: str = "an integer") -> int:
    """`value` as a Python integer; NumPy's integers are integers too, booleans are not."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise argument_error(name, value, expected)
    return int(value)


def as_positive_integer(name: str, value: Any, expected: str = "a positive integer") -> int:
    """`value` as a Python integer that is 1 or more."""
    if as_integer(name, value, expected) < 1:
        raise argument_error(name, value, expected)
    return int(value)


def as_positive_integer_or_none(name: str, value: Any) -> int | None:
    """`value` as a Python integer that is 1 or more, or None."""
    return None if value is None else as_positive_integer(name, value, "a positive integer or None")


def as_nonnegative_integer(name: str, value: Any) -> int:
    """`value` as a Python integer that is 0 or more."""
    expected = "an integer that is not negative"
    if as_integer(name, value, expected) < 0:
        raise argument_error(name, value, expected)
    return int(value)


def as_groups(name: str, value: Any) -> int:
    """`value` as a number of groups of channels: a Python integer that is 1 or more, or -1."""
    expected = "a positive integer, or -1 for one group for each channel"
    return -1 if as_integer(name, value, expected) == -1 else as_positive_integer(name, value, expected)


def as_nonnegative(name: str, value: Any) -> float:
    """`value` as a finite Python float that is 0 or more."""
    if not 0 <= _number(value) < math.inf:
        raise argument_error(name, value, "a finite number that is not negative")
    return float(value)


def as_epsilon(name: str, value: Any) -> float:
    """`value` as a finite Python float that can be added to a variance of 0, and then divided by: 1e-12 or more.

    It is the smallest for which second derivatives are numbers of float32.
    """
    return max(as_nonnegative(name, value), 1e-12)


def as_positive(name: str, value: Any) -> float:
    """`value` as a finite Python float that is more than 0."""
    if not 0 < _number(value) < math.inf:
        raise argument_error(name, value, "a finite positive number")
    return float(value)


def as_fraction(name: str, value: Any) -> float:
    """`value` as a Python float from 0 to 1."""
    if not 0 <= _number(value) <= 1:
        raise argument_error(name, value, "a number from 0 to 1")
    return float(value)


def as_boolean(name: str, value: Any) -> bool:
    """`value` as a Python boolean."""
    if not isinstance(value, (bool, np.bool_)):
        raise argument_error(name, value, "True or False")
    return bool(value)


def as_choice(name: str, value: Any, choices: Sequence) -> Any:
    """`value`, which is one of `choices`."""
    # Not `value in choices`: an array compares to an array.
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise argument_error(name, value, f"one of {', '.join(map(repr, choices))}")
    return value


def check_built_model(model: Any, name: str = "model") -> None:
    """Raises a ValueError unless `model` is a model with weights."""
    if not isinstance(model, keras.Model):
        raise argument_error(name, model, "a keras.Model")
    if not model.built:
        raise argument_error(
            name, model, "built, so that it has weights: call it on a batch, or begin a Sequential with a keras.Input"
        )


def check_divides_channels(name: str, groups: int, channels: int, input_shape: Sequence[int | None]) -> None:
    """Raises a ValueError unless a number of groups divides the number of channels."""
    if channels % groups:
        divisors = [n for n in range(1, channels + 1) if channels % n == 0]
        expected = f"a divisor of the number of channels, {channels}: one of {divisors}"
        raise argument_error(name, groups, expected, f"inputs.shape={tuple(input_shape)}")


def _number(value):
    """A number as a float; what is none as NaN, which no comparison accepts."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
