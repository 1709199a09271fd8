"""The checks of arguments: one table of what each accepts, as what, and what each refuses."""

import fractions
import math

import keras
import numpy as np
import pytest

from keras_proxynorm import arguments

INF, NAN = math.inf, math.nan
NO_NUMBERS = ["1", None, 1j, [1], np.ones(2), True, np.True_, NAN, np.float32(NAN)]
NO_INTEGERS = [*NO_NUMBERS, 1.0, np.float32(1), INF]


def choice(name, value):
    return arguments.as_choice(name, value, ("sum", "max"))


# For each check: values and what they become, then values that are refused.
TABLE = {
    arguments.as_boolean: ({True: True, np.False_: False}, [0, 1, 1.0, None, "no", "True", np.ones(2, bool)]),
    choice: ({"sum": "sum", np.str_("max"): "max"}, ["Sum", None, 0, ["sum"], np.array(["sum", "max"])]),
    arguments.as_integer: ({-3: -3, 0: 0, np.int8(4): 4}, NO_INTEGERS),
    arguments.as_positive_integer: ({1: 1, np.uint8(4): 4}, [*NO_INTEGERS, 0, -1]),
    arguments.as_positive_integer_or_none: ({1: 1, None: None}, [0, -1, 1.5, "1", True]),
    arguments.as_nonnegative_integer: ({0: 0, np.int64(4): 4}, [*NO_INTEGERS, -1]),
    arguments.as_groups: ({8: 8, -1: -1, np.int64(-1): -1}, [*NO_INTEGERS, 0, -2]),
    arguments.as_nonnegative: (
        {0: 0.0, 1e-3: 1e-3, np.float32(0.5): 0.5, fractions.Fraction(1, 4): 0.25},
        [*NO_NUMBERS, -1e-9, INF, -INF, np.float32(INF), 10**400],
    ),
    arguments.as_epsilon: ({0: 1e-12, 1e-30: 1e-12, 0.5: 0.5}, [*NO_NUMBERS, -1e-9, INF, 10**400]),
    arguments.as_positive: ({1: 1.0, 1e-30: 1e-30, np.float64(2): 2.0}, [*NO_NUMBERS, 0, -1, INF, 10**400]),
    arguments.as_fraction: ({0: 0.0, 1: 1.0, np.float32(0.5): 0.5}, [*NO_NUMBERS, -0.1, 1.1, INF, -(10**400)]),
}


@pytest.mark.parametrize("check", TABLE)
def test_what_is_accepted(check):
    for value, expected in TABLE[check][0].items():
        found = check("x", value)
        assert found == expected
        # What goes into a config must be of Python, also where it was NumPy's; strings of NumPy are strings.
        assert isinstance(found, str) or type(found) is type(expected)


@pytest.mark.parametrize("check, value", [(check, value) for check, (_, refused) in TABLE.items() for value in refused])
def test_what_is_refused(check, value):
    with pytest.raises(ValueError, match=r"^Argument `x` must be .+\. Received: x=") as caught:
        check("x", value)
    assert str(caught.value).endswith(f"x={value!r}")


def test_groups_must_divide_the_channels():
    arguments.check_divides_channels("groups", 4, 12, (None, 5, 12))
    with pytest.raises(
        ValueError, match=r"`groups`.*channels, 12: one of \[1, 2, 3, 4, 6, 12\].*groups=5.*None, 5, 12"
    ):
        arguments.check_divides_channels("groups", 5, 12, (None, 5, 12))


def test_models_must_be_built():
    arguments.check_built_model(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))
    with pytest.raises(ValueError, match="`teacher` must be built.*a Sequential with a keras.Input.*teacher=<Seq"):
        arguments.check_built_model(keras.Sequential([keras.layers.Dense(2)]), "teacher")
    with pytest.raises(ValueError, match="`model` must be a keras.Model.*model=3"):
        arguments.check_built_model(3)
