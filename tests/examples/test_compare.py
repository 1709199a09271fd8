"""The parts of examples/compare.py, and all of it on few images."""

import csv
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from scripts import load_script

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

RUN = {
    "normalization": "batch_norm",
    "batch_size": 4,
    "seed": 1,
    "images": "noise",
    "image_size": 8,
    "epochs": 2,
    "depth": 3,
    "learning_rate": 0.1,
}


@pytest.fixture(scope="module")
def compare():
    return load_script("examples/compare.py")


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    images = random.standard_normal((24, 8, 8, 1)).astype("float32")
    labels = np.arange(24) % 3
    return (images[:18], labels[:18]), (images[18:], labels[18:])


@pytest.fixture
def trained(compare, monkeypatch):
    """The runs that are trained, which takes no time."""
    runs = []

    def train_and_test(run, train, test):
        runs.append(run)
        return {"test_accuracy": 0.5, "seconds": 2.0}

    monkeypatch.setattr(compare, "train_and_test", train_and_test)
    return runs


def call_main(compare, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, options)])
    compare.main()


def test_digits(compare):
    (train_images, train_labels), (test_images, test_labels) = compare.split(*compare.load_images(None, 16))
    assert train_images.shape == (1347, 16, 16, 1) and test_images.shape == (450, 16, 16, 1)
    assert train_images.dtype == test_images.dtype == np.float32
    assert train_images.mean() == pytest.approx(0, abs=1e-4) and train_images.std() == pytest.approx(1, abs=1e-4)
    assert np.bincount(train_labels).min() >= 130 and np.bincount(test_labels).min() >= 43


def test_image_folder(compare, tmp_path):
    random = np.random.default_rng(0)
    for index in range(3):
        for number in range(4):
            # Class by brightness, so that a label can be told from its image.
            image = random.integers(0, 10, (20, 30, 3)) + 60 * index
            path = str(tmp_path / f"class_{index}" / f"{number}.png")
            tf.io.write_file(path, tf.io.encode_png(image.astype("uint8")))
    images, labels = compare.load_images(tmp_path, 12)
    assert images.shape == (12, 12, 12, 3)
    assert np.array_equal(labels, images.mean(axis=(1, 2, 3)) // 60)


def test_runs_of_a_seed_start_alike_and_see_the_same_images(compare, data, monkeypatch):
    seen, kernels = {}, {}

    def fit(model, images, labels, **kwargs):
        seen.setdefault(name, []).append((images, labels))
        linear = [layer for layer in model.layers if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))]
        kernels[name] = [keras.ops.convert_to_numpy(layer.kernel) for layer in linear]

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(keras.Model, "evaluate", lambda *args, **kwargs: (1.0, 0.5))
    for name in ("batch_norm", "group_norm", "group_norm_proxy"):
        compare.train_and_test({**RUN, "normalization": name}, *data)
        assert len(kernels[name]) == 4 and all(map(np.array_equal, kernels[name], kernels["batch_norm"]))
        for images, expected in zip(seen[name], seen["batch_norm"], strict=True):
            assert all(map(np.array_equal, images, expected))
    (first, labels), (second, _) = seen["batch_norm"]
    assert len(first) == len(second) == len(labels) == 16  # four full batches of the 18 images
    assert not np.array_equal(first, second)
    compare.train_and_test({**RUN, "seed": 2}, *data)
    assert not np.array_equal(seen["group_norm_proxy"][0][0], data[0][0][:16])


def test_learning_rate(compare, data, monkeypatch):
    """It is proportional to the batch size, with a warm-up and a cosine decay."""
    compiled = []
    monkeypatch.setattr(keras.Model, "fit", lambda *args, **kwargs: None)
    monkeypatch.setattr(keras.Model, "evaluate", lambda *args, **kwargs: (1.0, 0.5))
    compile_model = compare.compile_model

    def recorded(model, rate, steps):
        compiled.append((rate, steps))
        compile_model(model, rate, steps)

    monkeypatch.setattr(compare, "compile_model", recorded)
    compare.train_and_test({**RUN, "batch_size": 2, "epochs": 3}, *data)
    assert compiled == [(pytest.approx(0.1 / 32), 27)]
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    compile_model(model, 0.2, steps=200)
    rates = {}
    for step in (0, 5, 10, 105, 200):
        model.optimizer.iterations.assign(step)
        rates[step] = float(model.optimizer.learning_rate)
    assert rates == pytest.approx({0: 0, 5: 0.1, 10: 0.2, 105: 0.1, 200: 0}, abs=1e-6)


def test_script_resumes(compare, data, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "split", lambda *arrays: data)
    options = ["--output", tmp_path / "out", "--epochs", 2, "--depth", 3, "--batch-sizes", 8, 4, "--normalizations"]
    call_main(compare, monkeypatch, *options, "group_norm_proxy")
    assert "[2/2] group_norm_proxy, batch size 8, seed 0: test accuracy" in capsys.readouterr().out
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["normalization"], row["batch_size"]) for row in rows] == [("group_norm_proxy", size) for size in "48"]
    assert all(0 <= float(row["test_accuracy"]) <= 1 for row in rows)
    image = tf.io.decode_png((tmp_path / "out" / "compare.png").read_bytes()).numpy()
    assert image.shape[1] == 960 and image.std() > 10

    runs = []
    monkeypatch.setattr(
        compare,
        "train_and_test",
        lambda run, *data: runs.append(run["normalization"]) or {"test_accuracy": 0.5, "seconds": 2.0},
    )
    call_main(compare, monkeypatch, *options, "group_norm_proxy", "layer_norm")
    assert runs == ["layer_norm"] * 2
    table = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    lines = [[entry.strip() for entry in line.strip("|\n").split("|")] for line in table.splitlines()]
    assert lines[0] == ["test accuracy in %", "batch size 4", "batch size 8"]
    assert lines[2:] == [
        ["group_norm_proxy", *(f"{100 * float(row['test_accuracy']):.1f}" for row in rows)],
        ["layer_norm", "50.0", "50.0"],
    ]


@pytest.mark.parametrize("change", [{"epochs": 7}, {"learning_rate": 0.2}, {"images": "digits"}, {"seed": 2}])
def test_other_conditions_are_other_runs(compare, data, trained, tmp_path, change):
    runs = [RUN, {**RUN, **change}]
    for _ in range(2):
        rows = compare.do_missing(tmp_path / "compare.csv", runs, *data)
    assert trained == runs
    for row, run in zip(rows, runs, strict=True):
        assert row == {**{name: str(value) for name, value in run.items()}, "test_accuracy": "0.5", "seconds": "2.0"}


def test_other_columns_are_refused(compare, data, trained, tmp_path):
    file = tmp_path / "compare.csv"
    file.write_text("normalization,accuracy\nbatch_norm,0.5\n")
    with pytest.raises(SystemExit, match="compare.csv has other columns than this script writes"):
        compare.do_missing(file, [RUN], *data)
    assert trained == [] and file.read_text().count("\n") == 2


def test_summary_of_seeds(compare):
    rows = [{"normalization": "none", "batch_size": "8", "test_accuracy": text} for text in ("0.9", "0.95")]
    table = compare.make_table(compare.summarize(rows))
    assert table.splitlines()[2] == "| none | 92.5 ± 3.5 |"


@pytest.mark.parametrize(
    "options",
    [
        ("--normalizations", "batch_norm", "unknown"),
        ("--batch-sizes", 2, 0),
        ("--epochs", 0),
        ("--depth", 4),
        ("--depth", 0),
        ("--learning-rate", 0),
        ("--learning-rate", "nan"),
        ("--images", "missing"),
        ("--image-size", 0),
    ],
)
def test_bad_options(compare, monkeypatch, capsys, tmp_path, options):
    with pytest.raises(SystemExit):
        call_main(compare, monkeypatch, "--output", tmp_path / "out", *options)
    assert f"error: {options[0]} must " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_batch_larger_than_the_data(compare, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="--batch-sizes must be at most 1347"):
        call_main(compare, monkeypatch, "--output", tmp_path / "out", "--batch-sizes", 2000)


@pytest.mark.slow
def test_training(compare):
    train, test = compare.split(*compare.load_images(None, 16))
    run = {**RUN, "batch_size": 8, "epochs": 3}
    for name in ("batch_norm", "group_norm_proxy"):
        assert compare.train_and_test({**run, "normalization": name}, train, test)["test_accuracy"] > 0.8
