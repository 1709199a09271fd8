"""The model that an export writes down: the inference form of the user's model, as a copy of the exporter's own."""

import warnings

import keras

from keras_proxynorm.folding.folded_normalization import set_form
from keras_proxynorm.folding.folding import FoldReport
from keras_proxynorm.folding.folding import fold_with_report

__all__ = ["folded_copy", "inference_model"]


def folded_copy(model: keras.Model, form: str, through_gates: bool = False) -> tuple[keras.Model, FoldReport]:
    """The folded model, in the form for a runtime, and the report of `fold`, whose warnings are given.

    Args:
        model: The user's model.
        form: As in `keras_proxynorm.folding.forms.normalize_and_activate`.
        through_gates: As in `fold_with_report`.

    Raises:
        ValueError: If the model cannot be folded.
    """
    folded, report = fold_with_report(model, through_gates)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=4)
    set_form(folded, form)
    return folded, report


def inference_model(model: keras.Model, form: str, through_gates: bool = False) -> tuple[keras.Model, str]:
    """As `folded_copy`, with what was folded in words; a model that cannot be folded is returned, with a warning."""
    try:
        folded, report = folded_copy(model, form, through_gates)
    except ValueError as error:
        warnings.warn(
            f"The model '{model.name}' is exported without folding, as with fold=False, because it cannot be folded: "
            f"{error}",
            stacklevel=3,
        )
        return model, "nothing"
    return folded, report.summary()
