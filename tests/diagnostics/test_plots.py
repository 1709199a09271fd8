"""What is drawn, and what happens without matplotlib."""

import sys

import numpy as np
import pytest
from diagnostics.samples import L, images, small

from keras_proxynorm.diagnostics import (
    CollapseReport,
    LossLandscape,
    PowerDecomposition,
    SignalPropagation,
    collapse_report,
    power_decomposition,
    signal_propagation,
)

POWER = PowerDecomposition(("a", "b", "c"), np.array([[1.0, 1, 2, 4], [0, 1, 3, 0], [0, 0, 0, 0]]))
SIGNAL = SignalPropagation(
    ("a", "b"),
    np.array([0.1, -0.2]),
    np.array([1.0, 10.0]),
    np.array([0.5, 0.9]),
    np.array([3.0, 2.0]),
    np.array([1e-3, 1.0]),
)
LANDSCAPE = LossLandscape(
    2.0, 4.0, np.array([0.1, 1.0, 10.0]), np.array([1.0, 3.0, np.inf]), np.array([0.4, 8.0, np.nan]), 0.5
)


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


def replaced(result, **values):
    return type(result)(**{**{name: getattr(result, name) for name in result.__dataclass_fields__}, **values})


def test_powers(plt):
    ax = POWER.plot(title="title")
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("normalization layer", "fraction of power", "title")
    heights = np.array([[bar.get_height() for bar in bars] for bars in ax.containers]).T
    np.testing.assert_allclose(heights, [[0.125, 0.125, 0.25, 0.5], [0, 0.25, 0.75, 0], [0, 0, 0, 0]])
    bottoms = np.array([[bar.get_y() for bar in bars] for bars in ax.containers]).T
    np.testing.assert_allclose(bottoms[:2], (np.cumsum(heights, 1) - heights)[:2])
    np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in ax.containers[0]], [1, 2, 3])
    assert [text.get_text()[:2] for text in ax.get_legend().get_texts()] == ["P4", "P3", "P2", "P1"]
    assert ax.get_xlim() == (0.5, 3.5) and ax.get_ylim() == (0, 1)
    ax.figure.canvas.draw()


def test_powers_into_given_axes(plt):
    _, (left, right) = plt.subplots(1, 2)
    count = len(plt.get_fignums())
    assert POWER.plot(right) is right and not left.containers and len(right.containers) == 4
    assert not right.get_title() and len(plt.get_fignums()) == count


def test_the_report_plots_its_powers(plt):
    report = CollapseReport(POWER.names, POWER, np.full(3, np.nan), np.full(3, np.nan), ())
    ax = report.plot(title="mine")
    assert ax.get_title() == "mine" and len(ax.containers) == 4


def test_signals(plt):
    axes = SIGNAL.plot()
    assert len(axes) == 5
    for ax, name in zip(axes, ("mean", "std", "cosine", "stable_rank", "gradient_norm"), strict=True):
        (line,) = ax.lines
        np.testing.assert_array_equal(line.get_xdata(), [1, 2])
        np.testing.assert_array_equal(line.get_ydata(), getattr(SIGNAL, name))
        assert ax.get_xlabel() == "layer" and ax.get_title()
    assert [ax.get_yscale() for ax in axes] == ["linear", "log", "linear", "linear", "log"]
    assert len({ax.get_title() for ax in axes}) == 5 and axes[0].get_legend() is None
    axes[0].figure.canvas.draw()


def test_signals_one_beside_another(plt):
    axes = SIGNAL.plot(label="one")
    again = SIGNAL.plot(axes, label="two")
    assert [ax.figure for ax in again] == [axes[0].figure] * 5
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["one", "two"]
    for ax in axes:
        a, b = ax.lines
        assert a.get_color() != b.get_color() and a.get_marker() != b.get_marker()


def test_signals_without_gradients(plt):
    plain = replaced(SIGNAL, gradient_norm=np.full(2, np.nan))
    assert len(plain.plot()) == 4
    axes = SIGNAL.plot()
    plain.plot(axes)
    assert [len(ax.lines) for ax in axes] == [2, 2, 2, 2, 1]


def test_the_one_without_gradients_first(plt):
    """A result with gradients needs a panel more than there is."""
    axes = replaced(SIGNAL, gradient_norm=np.full(2, np.nan)).plot()
    with pytest.raises(ValueError, match="Argument `axes` must have 5 axes. Received: 4"):
        SIGNAL.plot(axes)


def test_a_column_without_numbers_does_not_shift_the_others(plt):
    """The cosine of single samples: what is next to it stays in its panel."""
    axes = SIGNAL.plot()
    replaced(SIGNAL, cosine=np.full(2, np.nan)).plot(axes)
    titles = [ax.get_title() for ax in axes]
    assert titles == [ax.get_title() for ax in SIGNAL.plot()]
    np.testing.assert_array_equal(axes[3].lines[1].get_ydata(), SIGNAL.stable_rank)


def test_a_zero_is_not_lost_on_a_logarithmic_scale(plt):
    axes = replaced(SIGNAL, std=np.array([0.0, 1.0])).plot()
    assert axes[1].get_yscale() == "linear"


def test_a_second_result_with_a_zero_is_not_lost(plt):
    axes = SIGNAL.plot()
    replaced(SIGNAL, std=np.array([0.0, 1.0])).plot(axes)
    assert axes[1].get_yscale() in ("linear", "symlog")


def test_landscape(plt):
    axes = LANDSCAPE.plot()
    assert len(axes) == 2
    loss, change = axes[0].lines[0], axes[1].lines[0]
    # What is not finite is not drawn.
    np.testing.assert_allclose(loss.get_xydata(), [[0.1, 0.5], [1, 1.5]])
    np.testing.assert_allclose(change.get_xydata(), [[0.1, 1.0], [1, 2.0]])
    for ax in axes:
        assert ax.get_xscale() == "log" and ax.get_xlabel() == "step size" and ax.get_ylabel()
        assert any(np.allclose(line.get_xdata(), 0.5) for line in ax.lines[1:])
    assert any(np.allclose(line.get_ydata(), 1.0) for line in axes[0].lines[1:])
    assert axes[0].get_title() == "largest stable step: 0.5" and "inf" in axes[1].get_title()
    axes[0].figure.canvas.draw()


def test_landscape_into_given_axes(plt):
    _, given = plt.subplots(2, 1)
    axes = LANDSCAPE.plot(given)
    assert list(axes) == list(given) and given[1].lines
    _, one = plt.subplots()
    with pytest.raises(ValueError, match="Argument `axes` must have 2 axes. Received: 1"):
        LANDSCAPE.plot(one)


@pytest.mark.filterwarnings("error")
def test_landscapes_with_little_in_them(plt):
    one = LossLandscape(2.0, 4.0, np.array([0.1]), np.array([1.0]), np.array([0.4]), 0.1)
    none = LossLandscape(2.0, 4.0, np.array([0.1, 1]), np.full(2, np.nan), np.full(2, np.inf), 0.0)
    for landscape in (one, none):
        landscape.plot()[0].figure.canvas.draw()


def test_one_layer_and_real_results(plt):
    model, (x, y) = small(L.LayerNormalization(name="norm")), images()
    power_decomposition(model, x, verbose=0).plot().figure.canvas.draw()
    signal_propagation(model, (x, y), loss="sparse_categorical_crossentropy", verbose=0).plot()[0].figure.canvas.draw()
    collapse_report(model, x, verbose=0).plot()


@pytest.mark.parametrize("result", [POWER, SIGNAL, LANDSCAPE], ids=lambda result: type(result).__name__)
def test_without_matplotlib(result, no_matplotlib):
    with pytest.raises(ImportError, match=r'pip install "keras_proxynorm\[plots\]"'):
        result.plot()
    assert result.to_dict() and str(result)


def test_the_rest_works_without_matplotlib(no_matplotlib):
    model, x = small(L.LayerNormalization(name="norm")), images()[0]
    power_decomposition(model, x, verbose=0)
    signal_propagation(model, x, verbose=0)
    print(collapse_report(model, x, verbose=0))
