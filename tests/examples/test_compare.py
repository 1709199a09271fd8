"""The parts of examples/compare.py, three of its cells and, as it is slow, all of it."""

import csv
import gzip
import os
import subprocess
import sys
import tempfile
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from scripts import ROOT
from scripts import load_script

import keras_proxynorm.training

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

SCRIPT = ROOT / "examples" / "compare.py"
RESULTS = {"test_accuracy": "0.5000", "test_loss": "1.0000", "parameters": "7", "seconds": "2.0"}


@pytest.fixture(scope="module")
def compare():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def data(compare):
    random = np.random.default_rng(0)
    images = random.standard_normal((24, 8, 8, 1)).astype("float32")
    labels = np.arange(24, dtype="int32") % 3
    return compare.Data("noise", images[:16], labels[:16], images[16:], labels[16:], 3)


@pytest.fixture
def parse(compare, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def parse(*options):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, options)])
        return compare.parse_arguments()

    return parse


@pytest.fixture
def arguments(parse, tmp_path):
    return parse("--output", tmp_path / "out")


@pytest.fixture
def trained(compare, monkeypatch):
    """The cells that are trained, which takes no time."""
    cells = []

    def run_cell(cell, *others):
        cells.append(cell)
        return RESULTS

    monkeypatch.setattr(compare, "run_cell", run_cell)
    return cells


def write_idx(file, array, kind=8):
    content = bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(compare, tmp_path):
    folder = tmp_path / "idx"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, images in (("train", 12), ("t10k", 6)):
        suffix = ".gz" if name == "train" else ""
        pixels = random.integers(0, 256, (images, 28, 28), "uint8")
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(images, dtype="uint8") % 5)
    return folder


def write_images(folder, classes, images):
    random = np.random.default_rng(0)
    for index in range(classes):
        for number in range(images):
            # Class by brightness, so that a label can be told from its image.
            image = random.integers(0, 10, (20, 30, 3)) + 60 * index
            tf.io.write_file(str(folder / f"class_{index}" / f"{number}.png"), tf.io.encode_png(image.astype("uint8")))
    return folder


def check_data(data, train, test, shape, classes):
    assert data.train_images.shape == (train, *shape) and data.test_images.shape == (test, *shape)
    assert data.train_labels.shape == (train,) and data.test_labels.shape == (test,)
    assert data.train_images.dtype == data.test_images.dtype == np.float32
    assert data.train_images.mean() == pytest.approx(0, abs=1e-4)
    assert data.train_images.std() == pytest.approx(1, abs=1e-4)
    assert data.classes == classes


def test_digits(compare, parse):
    data = compare.load_data(parse("--train-images", 100, "--test-images", 50))
    check_data(data, 100, 50, (16, 16, 1), 10)
    assert np.bincount(data.train_labels).min() >= 9
    again = compare.load_data(parse("--train-images", 100, "--test-images", 50))
    assert np.array_equal(again.train_images, data.train_images)
    assert np.array_equal(again.test_labels, data.test_labels)


def test_idx_files(compare, parse, idx_folder):
    data = compare.load_data(parse("--fashion-mnist", idx_folder, "--train-images", 10))
    check_data(data, 10, 6, (28, 28, 1), 5)
    assert data.name == "fashion_mnist"
    pixels = compare.read_idx(idx_folder / "train-images-idx3-ubyte.gz")[:10]
    expected = (pixels - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(data.train_images[..., 0], expected, rtol=1e-5, atol=1e-5)
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4] * 2
    smaller = compare.load_data(parse("--fashion-mnist", idx_folder, "--image-size", 14))
    check_data(smaller, 12, 6, (14, 14, 1), 5)


@pytest.mark.parametrize("damage", ["short", "long", "empty", "type"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_broken_idx_file(compare, tmp_path, damage, suffix):
    file = tmp_path / f"labels-idx1-ubyte{suffix}"
    write_idx(file, np.arange(50, dtype="uint8"), kind=13 if damage == "type" else 8)
    content = file.read_bytes()
    if damage != "type":
        file.write_bytes({"short": content[:-9], "long": content + b"more", "empty": b""}[damage])
    with pytest.raises(SystemExit, match=r"labels-idx1-ubyte(\.gz)? is not a whole (IDX file of bytes|gzip file)"):
        compare.read_idx(file)


def test_labels_of_other_images(compare, parse, idx_folder):
    write_idx(idx_folder / "t10k-labels-idx1-ubyte", np.arange(5, dtype="uint8"))
    with pytest.raises(SystemExit, match=r"images of shape \(6, 28, 28\) with labels of shape \(5,\)"):
        compare.load_data(parse("--fashion-mnist", idx_folder))


def test_missing_idx_file(parse, idx_folder, capsys):
    (idx_folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SystemExit):
        parse("--fashion-mnist", idx_folder)
    assert f"{idx_folder} has no train-labels-idx1-ubyte, with .gz or without" in capsys.readouterr().err


def test_image_folder(compare, parse, tmp_path):
    folder = write_images(tmp_path / "images", classes=3, images=8)
    options = parse("--images", folder, "--image-size", 12, "--train-images", 15)
    data = compare.load_data(options)
    check_data(data, 15, 6, (12, 12, 3), 3)
    assert data.name == str(folder)
    brightness = np.concatenate([data.train_images, data.test_images]).mean(axis=(1, 2, 3))
    labels = np.concatenate([data.train_labels, data.test_labels])
    assert [labels[brightness.argsort()][i] for i in (0, -1)] == [0, 2]
    assert np.array_equal(np.sort(labels), labels[brightness.argsort()])


def test_image_folder_that_is_too_small(compare, parse, tmp_path):
    folder = write_images(tmp_path / "images", classes=3, images=2)
    with pytest.raises(SystemExit, match="5 images to train with and 1 to test with are too few for 3 classes"):
        compare.load_data(parse("--images", folder))


def test_order(compare):
    order = compare.draw_order(11, 2, 3, seed=0)
    assert order.shape == (15, 2)
    passes = order.reshape(3, 10)
    assert all(len(set(images)) == 10 and set(images) <= set(range(11)) for images in passes.tolist())
    assert not np.array_equal(passes[0], passes[1])
    assert np.array_equal(order, compare.draw_order(11, 2, 3, seed=0))
    assert not np.array_equal(order, compare.draw_order(11, 2, 3, seed=1))


def test_batches(compare, data):
    order = compare.draw_order(16, 4, 2, seed=0)
    batches = list(compare.make_batches(data, order).as_numpy_iterator())
    assert len(batches) == 8
    for chosen, (images, labels) in zip(order, batches, strict=True):
        assert np.array_equal(images, data.train_images[chosen])
        assert np.array_equal(labels, data.train_labels[chosen])


def test_learning_rate_is_proportional_to_the_batch_size(compare, data, arguments):
    rates = {size: compare.learning_rate_for(size, 0.1) for size in (2, 64, 128)}
    assert rates == pytest.approx({2: 0.1 / 32, 64: 0.1, 128: 0.2})
    assert compare.conditions_of(compare.Cell("none", 2, 0), data, arguments)["learning_rate"] == "0.003125"
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    compare.compile_model(model, 0.2, steps=200)
    rates = {step: float(model.optimizer._learning_rate(step)) for step in (0, 5, 10, 105, 200)}
    assert rates == pytest.approx({0: 0, 5: 0.1, 10: 0.2, 105: 0.1, 200: 0}, abs=1e-6)


@pytest.mark.parametrize(("batch_size", "window"), [(1, 8), (2, 8), (3, 6), (8, 2), (64, 1)])
def test_window_of_cross_iteration_batch_norm(compare, data, arguments, batch_size, window):
    steps = arguments.epochs * (len(data.train_images) // batch_size)
    expected = {"window": window} if window == 1 else {"window": window, "burn_in": steps // 4}
    assert compare.arguments_for("cross_iteration_batch_norm", batch_size, steps) == expected
    for name in ("cross_iteration_batch_norm", "cross_iteration_batch_norm+sam_on"):
        cell = compare.Cell(name, batch_size, 0)
        assert compare.conditions_of(cell, data, arguments)["arguments"].startswith(f"window={window}")
    assert compare.arguments_for("group_norm", batch_size, steps) == {}


def test_cells_start_alike_and_see_the_same_images(compare, data, monkeypatch):
    orders, kernels = {}, {}
    make_batches, compile_model = compare.make_batches, compare.compile_model
    for name in ("batch_norm", "none", "group_norm_proxy"):

        def recorded_batches(data, order, name=name):
            orders[name] = order
            return make_batches(data, order)

        def recorded_compile(model, *others, name=name):
            linear = [layer for layer in model.layers if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))]
            kernels[name] = [keras.ops.convert_to_numpy(layer.kernel) for layer in linear]
            compile_model(model, *others)

        monkeypatch.setattr(compare, "make_batches", recorded_batches)
        monkeypatch.setattr(compare, "compile_model", recorded_compile)
        results = compare.run_cell(compare.Cell(name, 4, 1), data, 1, 3, 0.1, 0.5)
        assert list(results) == compare.RESULTS
        assert 0 <= float(results["test_accuracy"]) <= 1
        # 9 (16 + 16 32 + 32 64) + 64 3 + 3 without normalizations, which have 2 or 4 parameters a channel.
        extra = {"batch_norm": 2, "none": 0, "group_norm_proxy": 4}[name] * (16 + 32 + 64)
        assert int(results["parameters"]) == 23379 + extra
    for name in orders:
        assert np.array_equal(orders[name], compare.draw_order(16, 4, 1, seed=1))
        for kernel, expected in zip(kernels[name], kernels["batch_norm"], strict=True):
            assert np.array_equal(kernel, expected)


def test_sharpness_aware_minimization_gets_the_model(compare, monkeypatch):
    received = []

    def record(model, **kwargs):
        received.append((model, kwargs))
        return "wrapped"

    monkeypatch.setattr(keras_proxynorm.training, "SharpnessAwareMinimization", record, raising=False)
    assert compare.for_training("model", "batch_norm", 0.5) == "model"
    assert received == []
    assert compare.for_training("model", "group_norm+sam_on", 0.25) == "wrapped"
    assert received == [("model", {"rho": 0.25, "adaptive": "elementwise"})]


def test_cell_with_sharpness_aware_minimization(compare, data):
    results = compare.run_cell(compare.Cell("batch_norm+sam_on", 4, 0), data, 1, 3, 0.1, 0.5)
    assert int(results["parameters"]) == 23379 + 2 * (16 + 32 + 64)


def cells_of(compare, *names, batch_sizes=(2, 8), seeds=(0,)):
    return [compare.Cell(name, size, seed) for seed in seeds for size in batch_sizes for name in names]


def test_resume(compare, data, arguments, trained, capsys):
    first = cells_of(compare, "batch_norm", "none")
    assert list(compare.run_cells(first, data, arguments)) == trained == first
    assert "[1/4] batch_norm, batch size 2, seed 0: test accuracy 0.500 (2 s; about 1 min" in capsys.readouterr().out
    more = cells_of(compare, "group_norm+sam_on", "none", seeds=(0, 1))
    trained.clear()
    rows = compare.run_cells(more, data, arguments)
    assert trained == [cell for cell in more if cell not in first]
    assert set(rows) == {*first, *more}
    assert "none, batch size 8, seed 0: 0.500, from before" in capsys.readouterr().out
    with arguments.csv.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == len(rows) and list(lines[0]) == [*compare.CELL, *compare.CONDITIONS, *compare.RESULTS]
    assert {line["rho"] for line in lines if line["normalization"] == "none"} == {""}
    assert {line["rho"] for line in lines if line["normalization"] == "group_norm+sam_on"} == {"0.5"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", 7), "in line 2 epochs is '5', here it is '7'"),
        (("--learning-rate", 0.2), "in line 2 learning_rate is '0.003125', here it is '0.00625'"),
        (("--rho", 0.1), "in line 3 rho is '0.5', here it is '0.1'"),
    ],
)
def test_other_conditions_are_refused(compare, data, arguments, parse, trained, options, message):
    cells = cells_of(compare, "none", "group_norm+sam_on", batch_sizes=[2])
    compare.run_cells(cells, data, arguments)
    content = arguments.csv.read_bytes()
    with pytest.raises(SystemExit, match=message):
        compare.run_cells(cells, data, parse("--output", arguments.output, *options))
    assert trained == cells and arguments.csv.read_bytes() == content


def test_another_dataset_is_refused(compare, data, arguments, trained):
    cells = cells_of(compare, "none")
    compare.run_cells(cells, data, arguments)
    with pytest.raises(SystemExit, match="dataset is 'noise', here it is 'digits'"):
        compare.run_cells(cells, data._replace(name="digits"), arguments)


def test_broken_line_is_refused(compare, data, arguments, trained):
    cells = cells_of(compare, "none")
    compare.run_cells(cells, data, arguments)
    content = arguments.csv.read_text()
    arguments.csv.write_text(content[:-30])
    with pytest.raises(SystemExit, match=r"Line 3 of .*compare\.csv is not whole"):
        compare.run_cells(cells, data, arguments)
    arguments.csv.write_text(content.replace("seconds", "hours"))
    with pytest.raises(SystemExit, match="other columns"):
        compare.run_cells(cells, data, arguments)


def row_of(compare, cell, data, arguments, **results):
    return {
        **{name: str(value) for name, value in cell._asdict().items()},
        **compare.conditions_of(cell, data, arguments),
        **RESULTS,
        **results,
    }


def test_cells_of_another_process_are_not_run_again(compare, data, arguments, trained, monkeypatch):
    cells = cells_of(compare, "batch_norm", "none")

    def run_cell(cell, *others):
        if not trained:
            # The other one starts at the same time, and from the end.
            compare.start_file(arguments.csv)
            compare.append_line(arguments.csv, row_of(compare, cells[-1], data, arguments).values())
        trained.append(cell)
        return RESULTS

    monkeypatch.setattr(compare, "run_cell", run_cell)
    rows = compare.run_cells(cells, data, arguments)
    assert trained == cells[:-1] and set(rows) == set(cells)
    assert [path.name for path in arguments.output.iterdir()] == ["compare.csv"]


def test_lines_that_are_appended_at_the_same_time(compare, tmp_path):
    file = tmp_path / "lines.csv"

    def append(name):
        for i in range(200):
            compare.append_line(file, [name, i, "with, comma"])

    threads = [threading.Thread(target=append, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with file.open(newline="") as stream:
        lines = list(csv.reader(stream))
    assert sorted(lines) == sorted([name, str(i), "with, comma"] for name in "ab" for i in range(200))


def test_summary(compare, data, arguments, capsys):
    accuracies = {("none", 2): [0.8], ("none", 8): [0.825], ("group_norm", 8): [0.9, 0.95]}
    rows = {
        cell: row_of(compare, cell, data, arguments, test_accuracy=str(accuracy))
        for (name, size), values in accuracies.items()
        for seed, accuracy in enumerate(values)
        for cell in [compare.Cell(name, size, seed)]
    }
    compare.write_summary(arguments, rows)
    table = arguments.markdown.read_text(encoding="utf-8")
    lines = table.splitlines()
    assert [[text.strip() for text in line.strip("|").split("|")] for line in (lines[0], *lines[2:4])] == [
        ["normalization", "batch size 2", "batch size 8", "parameters"],
        ["none", "80.0 ± 0.0", "82.5 ± 0.0", "7"],
        ["group_norm", "", "92.5 ± 3.5", "7"],
    ]
    assert len({len(line) for line in lines[:4]}) == 1
    assert "over up to 2 seeds. noise, 16 images, 5 passes, 9 convolutions; tensorflow " in lines[-1]
    image = tf.io.decode_png(arguments.png.read_bytes()).numpy()
    assert image.shape[1] == 960 and image.std() > 10
    out = capsys.readouterr().out
    assert table in out and str(arguments.png) in out


def test_one_seed_has_no_deviation(compare, data, arguments):
    cell = compare.Cell("none", 2, 5)
    table = compare.make_table({cell: row_of(compare, cell, data, arguments)})
    assert "| 50.0 " in table and "±" not in table and "Test accuracy in percent. noise" in table


def test_no_plot(compare, data, parse, tmp_path):
    arguments = parse("--output", tmp_path / "out", "--no-plot")
    cell = compare.Cell("none", 2, 0)
    compare.write_summary(arguments, {cell: row_of(compare, cell, data, arguments)})
    assert [path.name for path in arguments.output.iterdir()] == ["compare.md"]


def test_lines_of_the_plot_can_be_told_apart(compare, data, arguments, monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    cells = cells_of(compare, *(f"norm_{i}" for i in range(25)), batch_sizes=[2, 8, 64])
    compare.plot(tmp_path / "plot.png", {cell: row_of(compare, cell, data, arguments) for cell in cells})
    monkeypatch.undo()
    (figure,) = kept
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 25
    (legend,) = figure.legends
    box, axes = legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert axes.x1 < box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
    plt.close(figure)


@pytest.mark.parametrize("accuracies, bottom", [((0.9, 0.8, 0.1), 78), ((0.9, 0.1, 0.1), 88), ((0, 0, 0), None)])
def test_what_diverged_is_below_the_frame(compare, data, arguments, monkeypatch, tmp_path, accuracies, bottom):
    plt = pytest.importorskip("matplotlib.pyplot")
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    cells = cells_of(compare, "norm", batch_sizes=[2, 8, 64])
    rows = zip(sorted(cells, key=lambda cell: cell.batch_size), accuracies, strict=True)
    rows = {cell: row_of(compare, cell, data, arguments, test_accuracy=str(accuracy)) for cell, accuracy in rows}
    compare.plot(tmp_path / "plot.png", rows)
    monkeypatch.undo()
    ax = kept[0].axes[0]
    title = ax.get_title()
    if bottom is None:
        assert title == "" and ax.get_ylim()[0] < 0
    else:
        assert ax.get_ylim()[0] == pytest.approx(bottom)
        assert title.startswith("Below the frame: ") and title.count("norm 10.0 at") == accuracies.count(0.1)
    plt.close(kept[0])


@pytest.mark.parametrize(
    "options",
    [
        ("--normalizations", "batch_norm", "unknown"),
        ("--normalizations", "batch_norm+sam"),
        ("--normalizations", "none+sam_on"),
        ("--batch-sizes", 2, 0),
        ("--seeds", -1),
        ("--epochs", 0),
        ("--depth", 4),
        ("--depth", 0),
        ("--learning-rate", 0),
        ("--learning-rate", "nan"),
        ("--rho", -1),
        ("--images", "missing"),
        ("--fashion-mnist", "missing"),
        ("--image-size", 0),
        ("--train-images", 0),
        ("--threads", 0),
    ],
)
def test_bad_options(parse, capsys, tmp_path, options):
    with pytest.raises(SystemExit):
        parse("--output", tmp_path / "out", *options)
    assert f"error: {options[0]} must " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_output_of_the_script_is_added_to(parse, capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        parse("--output", tmp_path)
    assert "must be a new or an empty directory, or one with compare.csv in it" in capsys.readouterr().err


@pytest.mark.slow
def test_script_in_two_processes(tmp_path):
    command = [
        *(sys.executable, SCRIPT, "--output", tmp_path / "out", "--train-images", "600", "--test-images", "200"),
        *("--epochs", "3", "--depth", "3", "--batch-sizes", "8", "32", "--threads", "1", "--normalizations"),
    ]
    contenders = [["batch_norm", "group_norm_proxy"], ["none", "batch_norm+sam_on"]]
    pipe = subprocess.PIPE
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    running = [
        subprocess.Popen([*command, *names], stdout=pipe, stderr=pipe, text=True, env=env) for names in contenders
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    done = subprocess.run(
        [*command, *contenders[0], *contenders[1]], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.count("from before") == 8
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.csv", "compare.md", "compare.png"}
    with (tmp_path / "out" / "compare.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    accuracies = {(row["normalization"], row["batch_size"]): float(row["test_accuracy"]) for row in rows}
    assert len(accuracies) == 8
    assert accuracies["group_norm_proxy", "8"] > 0.8
    assert accuracies["batch_norm", "8"] > 0.8
