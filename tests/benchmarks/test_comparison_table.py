"""The table of docs/baselines.md is what benchmarks/comparison_table.py makes of the committed results."""

import pytest
from scripts import ROOT
from scripts import load_script

from keras_proxynorm.surgery.targets import TARGETS


@pytest.fixture
def script():
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
