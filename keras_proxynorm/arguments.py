"""Checks of arguments that several parts of the package share: each returns the value, or raises a ValueError."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

__all__ = [
    "as_boolean",
    "as_choice",
    "as_fraction",
    "as_integer",
    "as_nonnegative",
    "as_positive",
    "as_positive_integer",
    "as_positive_integer_or_none",
    "check_built_model",
]


def as_integer(name: str, value: Any, expected: str = "an integer") -> int:
    """`value` as a Python integer; NumPy's integers are integers too, booleans are not."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise _refused(name, value, expected)
    return int(value)


def as_positive_integer(name: str, value: Any, expected: str = "a positive integer") -> int:
    """`value` as a Python integer that is 1 or more."""
    if as_integer(name, value, expected) < 1:
        raise _refused(name, value, expected)
    return int(value)


def as_positive_integer_or_none(name: str, value: Any) -> int | None:
    """`value` as a Python integer that is 1 or more, or None."""
    return None if value is None else as_positive_integer(name, value, "a positive integer or None")


def as_nonnegative(name: str, value: Any) -> float:
    """`value` as a finite Python float that is 0 or more."""
    if not _is_number(value) or not 0 <= float(value) < math.inf:
        raise _refused(name, value, "a finite number that is not negative")
    return float(value)


def as_positive(name: str, value: Any) -> float:
    """`value` as a finite Python float that is more than 0."""
    if not _is_number(value) or not 0 < float(value) < math.inf:
        raise _refused(name, value, "a finite positive number")
    return float(value)


def as_fraction(name: str, value: Any) -> float:
    """`value` as a Python float from 0 to 1."""
    if not _is_number(value) or not 0 <= float(value) <= 1:
        raise _refused(name, value, "a number from 0 to 1")
    return float(value)


def as_boolean(name: str, value: Any) -> bool:
    """`value` as a Python boolean."""
    if not isinstance(value, (bool, np.bool_)):
        raise _refused(name, value, "True or False")
    return bool(value)


def as_choice(name: str, value: Any, choices: Sequence) -> Any:
    """`value`, which is one of `choices`."""
    # Not `value in choices`, which an array answers with an array, and 1 with True.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise _refused(name, value, f"one of {', '.join(map(repr, choices))}")
    return value


def check_built_model(model: Any, name: str = "model") -> None:
    """Raises a ValueError unless `model` is a model with weights."""
    if not isinstance(model, keras.Model):
        raise _refused(name, model, "a keras.Model")
    if not model.built:
        raise ValueError(
            f"Argument `{name}` must be built, so that it has weights: call it on a batch, or begin a Sequential with "
            f"a keras.Input. Received: {name}={model!r}"
        )


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _refused(name, value, expected):
    return ValueError(f"Argument `{name}` must be {expected}. Received: {name}={value!r}")
