"""Plots of the results of diagnostics; matplotlib is imported when the first one is drawn."""

from typing import Any

import numpy as np

__all__ = ["new_axes", "plot_landscape", "plot_powers", "plot_signal"]

# From dark to light, to be distinguishable in grey and by the colour-blind.
_POWER_COLOURS = ("#3b0f4f", "#2a788e", "#7fc7a0", "#fff2a8")
_POWER_LABELS = (
    "P1: channel means",
    "P2: means, between samples",
    "P3: stddevs, in a sample",
    "P4: stddevs, between samples",
)
# Colours of Okabe and Ito, and markers and dashes for those who cannot distinguish colours.
_LINE_STYLES = (
    {"color": "#0072b2", "marker": "o"},
    {"color": "#e69f00", "marker": "s", "linestyle": "--"},
    {"color": "#009e73", "marker": "^", "linestyle": ":"},
    {"color": "#000000", "marker": "x", "linestyle": "-."},
)
# Inches. Two side by side fit a README of 900 pixels.
_PANEL = (4.6, 3.0)


def new_axes(columns: int = 1, panel: tuple[float, float] = _PANEL) -> np.ndarray:
    """An array of axes of a new figure, side by side."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "keras_proxynorm[plots]"') from error
    size = (panel[0] * columns, panel[1])
    _, axes = plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained", dpi=120)
    return axes[0]


def plot_powers(result: Any, ax: Any = None, title: str | None = None, legend: bool = True) -> Any:
    """A stacked bar for each layer, of the four fractions of its power."""
    # The legend is to the right.
    ax = ax or new_axes(panel=(7.4, 3.0))[0]
    depth = np.arange(1, len(result) + 1)
    bottom = np.zeros(len(result))
    for label, colour, fraction in zip(_POWER_LABELS, _POWER_COLOURS, result.fractions.T, strict=True):
        ax.bar(depth, fraction, bottom=bottom, width=1.0, color=colour, label=label, linewidth=0)
        bottom += fraction
    ax.set(xlabel="normalization layer", ylabel="fraction of power", ylim=(0, 1), xlim=(0.5, len(result) + 0.5))
    ax.xaxis.get_major_locator().set_params(integer=True)
    if title:
        ax.set_title(title)
    if legend:
        # In stacking order.
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return ax


_SIGNALS = {
    "mean": ("activation mean", "linear"),
    "std": ("activation stddev", "log"),
    "cosine": ("cosine between samples", "linear"),
    "stable_rank": ("stable rank", "linear"),
    "gradient_norm": ("gradient norm", "log"),
}


def plot_signal(result: Any, axes: Any = None, label: str | None = None) -> np.ndarray:
    """A panel for each quantity, against depth."""
    columns = result.columns()
    if np.isnan(columns["gradient_norm"]).all():
        del columns["gradient_norm"]
    axes = new_axes(len(columns), panel=(2.5, 2.4)) if axes is None else np.ravel(axes)
    if len(axes) < len(columns):
        raise ValueError(f"Argument `axes` must have {len(columns)} axes. Received: {len(axes)}")
    depth = np.arange(1, len(result) + 1)
    for ax, (name, values) in zip(axes, columns.items(), strict=False):
        title, scale = _SIGNALS[name]
        # Each further result in the same axes has another style.
        style = _LINE_STYLES[len(ax.lines) % len(_LINE_STYLES)]
        ax.plot(depth, values, markersize=3, linewidth=1.2, label=label, **style)
        ax.set(xlabel="layer", title=title)
        shown = np.concatenate([line.get_ydata() for line in ax.lines])
        positive = shown[np.isfinite(shown)] > 0
        ax.set_yscale("log" if scale == "log" and positive.size and positive.all() else "linear")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    if label is not None:
        axes[0].legend(frameon=False)
    return axes


def plot_landscape(result: Any, axes: Any = None) -> np.ndarray:
    """The relative loss and the change of the gradient, against the step size."""
    axes = new_axes(2) if axes is None else np.ravel(axes)
    if len(axes) < 2:
        raise ValueError(f"Argument `axes` must have 2 axes. Received: {len(axes)}")
    steps = result.step_sizes
    for ax, values, label, limit in (
        (axes[0], result.relative_losses, "loss / loss before step", 1.0),
        (axes[1], result.smoothness, "gradient change / step length", None),
    ):
        shown = np.isfinite(values)
        ax.plot(steps[shown], values[shown], markersize=3, linewidth=1.2, **_LINE_STYLES[0])
        ax.set(xlabel="step size", ylabel=label, xscale="log")
        if len(steps) > 1:
            ax.set_xlim(steps[0], steps[-1])
        if limit is None and (values[shown] > 0).any():
            ax.set_yscale("log")
        if limit is not None:
            ax.axhline(limit, color="0.4", linewidth=0.8)
            ax.set_ylim(0, 2 * limit)
        if result.largest_stable_step > 0:
            ax.axvline(result.largest_stable_step, color="0.4", linewidth=0.8, linestyle=":")
        ax.grid(alpha=0.3)
    axes[0].set_title(f"largest stable step: {result.largest_stable_step:.3g}")
    axes[1].set_title(f"effective smoothness: {result.effective_smoothness:.3g}")
    return axes
