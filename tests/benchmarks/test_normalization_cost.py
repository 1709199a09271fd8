"""The parts of benchmarks/normalization_cost.py, without the measurement."""

import csv
import sys

import keras
import pytest
from backends import tensorflow_only
from scripts import ROOT, load_script

pytestmark = tensorflow_only


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_script("benchmarks/normalization_cost.py")


@pytest.mark.parametrize(("name", "parameters"), [("none", 0), ("batch_norm", 672), ("batch_norm+sam_on", 672)])
def test_step_trains(benchmark, monkeypatch, name, parameters):
    trained = []
    train_on_batch = keras.Model.train_on_batch

    def recorded(model, images, labels):
        trained.append((model, images.shape, labels.shape))
        return train_on_batch(model, images, labels)

    monkeypatch.setattr(keras.Model, "train_on_batch", recorded)
    step, count = benchmark.training_step(name, 2)
    assert count == 120602 + parameters
    step()
    ((model, images, labels),) = trained
    assert (images, labels) == ((2, 28, 28, 1), (2,))
    assert int(model.optimizer.iterations) == 1


def test_rows(benchmark, monkeypatch, tmp_path, capsys):
    file = tmp_path / "results" / "cost.csv"

    def medians_in_turns(contenders, repeats):
        return {name: 1e-3 * (i + 1) for i, name in enumerate(contenders)}

    monkeypatch.setattr(benchmark, "in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(benchmark, "medians_in_turns", medians_in_turns)
    monkeypatch.setattr(benchmark, "set_threads", lambda threads: None)
    monkeypatch.setattr(benchmark, "training_step", lambda name, batch_size: (None, 7))
    monkeypatch.setattr(benchmark, "results_file", lambda *conditions: file)
    for options in (
        ["--batch-sizes", "8", "--normalizations", "batch_norm", "none", "group_norm"],
        ["--batch-sizes", "2", "8", "--normalizations", "group_norm"],
    ):
        monkeypatch.setattr(sys, "argv", ["normalization_cost.py", "--threads", "1", *options])
        benchmark.main()
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["normalization"], row["batch_size"]): row["ratio_to_batch_norm"] for row in rows} == {
        ("batch_norm", "2"): "1.000",
        ("batch_norm", "8"): "1.000",
        ("group_norm", "2"): "2.000",
        ("group_norm", "8"): "2.000",  # measured again
        ("none", "8"): "2.000",
    }
    assert "group_norm" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--batch-sizes", "--threads", "--repeats"])
def test_bad_options(benchmark, monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["normalization_cost.py", option, "0"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert f"error: {option} must be at least 1" in capsys.readouterr().err
