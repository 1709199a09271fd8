"""The table of docs/baselines.md is what benchmarks/comparison_table.py makes of the committed results; its plot."""

import pytest
from scripts import ROOT, load_script

from keras_proxynorm.surgery.targets import TARGETS


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_script("benchmarks/comparison_table.py")


def test_docs_have_what_the_script_prints(script):
    assert script.measured_table() in (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")


def test_every_cell_was_measured(script):
    names = [name for _, name, _ in script.ROWS]
    assert sorted(names) == sorted([*TARGETS, "batch_norm", "none", "batch_norm+sam_on"])
    for line in script.measured_table().splitlines()[2:]:
        assert len(line.split(" | ")) == 7 and "-" not in line.split(" | ")[3:], line


def test_files_of_limit_cases_exist(script):
    for _, _, cases in script.ROWS:
        files = [part for part in cases.replace("(", " ").replace(")", " ").split() if part.endswith(".py")]
        assert files, cases
        for file in files:
            assert (ROOT / (file if "/" in file else f"tests/baselines/{file}")).is_file(), file


def test_table(script):
    comparison = [
        {"normalization": "none", "batch_size": "8", "test_accuracy": accuracy} for accuracy in ("0.5", "0.7")
    ] + [{"normalization": "batch_norm", "batch_size": "8", "test_accuracy": "0.25"}]
    costs = [{"normalization": "none", "batch_size": "64", "ratio_to_batch_norm": "0.505"}]
    rows = {line.split("`")[1]: line for line in script.make_table(comparison, costs).splitlines()[2:] if "`" in line}
    found = {name: [cell.strip(" |") for cell in line.split(" | ")[3:]] for name, line in rows.items()}
    assert found["layer_norm"] == ["- / -", "-", "-", "-"]
    (none,) = (line for line in script.make_table(comparison, costs).splitlines() if "| `none` |" in line)
    assert [cell.strip(" |") for cell in none.split(" | ")[3:]] == ["- / 0.51", "-", "60.0 ± 14.1", "-"]


def row(name, size, accuracy):
    return {"normalization": name, "batch_size": str(size), "test_accuracy": str(accuracy)}


def test_lines_of_the_plot_can_be_told_apart(script):
    pytest.importorskip("matplotlib")
    figure = script.make_plot([row(f"norm_{i}", size, 0.5) for i in range(25) for size in (2, 8, 64)])
    figure.canvas.draw()
    ax, (legend,) = figure.axes[0], figure.legends
    lines = [container.lines[0] for container in ax.containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 25
    box, frame = legend.get_window_extent(), ax.get_window_extent()
    assert frame.x1 < box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("accuracies, bottom", [((0.9, 0.8, 0.1), 78), ((0.9, 0.1, 0.1), 88), ((0, 0, 0), None)])
def test_what_diverged_is_below_the_frame(script, accuracies, bottom):
    pytest.importorskip("matplotlib")
    figure = script.make_plot([row("norm", size, value) for size, value in zip((2, 8, 64), accuracies, strict=True)])
    ax = figure.axes[0]
    title = ax.get_title()
    if bottom is None:
        assert title == "" and ax.get_ylim()[0] < 0
    else:
        assert ax.get_ylim()[0] == pytest.approx(bottom)
        assert title.startswith("Below the frame: ") and title.count("norm 10.0 at") == accuracies.count(0.1)
