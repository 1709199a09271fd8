"""The model that an export contains: the inference form of the user's model, as a copy that the exporter owns."""

import warnings

import keras

from keras_proxynorm.export.open_sizes import with_traceable_resizing
from keras_proxynorm.export.precision import computes_in
from keras_proxynorm.folding.folded_normalization import set_form
from keras_proxynorm.folding.folding import FoldReport, fold_with_report

__all__ = ["folded_copy", "inference_model", "unfolded_model"]


def folded_copy(
    model: keras.Model, form: str, *, through_gates: bool = False, open_sizes: bool = False
) -> tuple[keras.Model, FoldReport]:
    """The folded model, in the form for a runtime, and the report of `fold`; issues the warnings of the report.

    Args:
        model: The user's model.
        form: As in `keras_proxynorm.folding.forms.normalize_and_activate`.
        through_gates: As in `fold_with_report`.
        open_sizes: Whether the export leaves sizes other than the batch open.

    Raises:
        ValueError: If the model cannot be folded.
    """
    folded, report = fold_with_report(model, through_gates)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=4)
    if open_sizes:
        folded = with_traceable_resizing(folded)
    # The operation that stands for InstanceNormalization has no kernel for float64.
    set_form(folded, "keras" if computes_in(folded, ["float64"]) else form)
    return folded, report


def inference_model(
    model: keras.Model, form: str, *, through_gates: bool = False, open_sizes: bool = False
) -> tuple[keras.Model, str]:
    """As `folded_copy`, with a summary of the report; a model that cannot be folded stays as it is, with a warning."""
    try:
        folded, report = folded_copy(model, form, through_gates=through_gates, open_sizes=open_sizes)
    except ValueError as error:
        warnings.warn(
            f"The model '{model.name}' is exported without folding, as with fold=False, because it cannot be folded: "
            f"{error}",
            stacklevel=3,
        )
        return unfolded_model(model, open_sizes=open_sizes), "nothing"
    return folded, report.summary()


def unfolded_model(model: keras.Model, *, open_sizes: bool) -> keras.Model:
    """The model itself, or a copy if it cannot be traced as it is."""
    return with_traceable_resizing(model) if open_sizes else model
