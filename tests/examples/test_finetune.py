"""The parts of examples/finetune.py, and, as it is slow, all of it."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from scripts import ROOT, load_script

import keras_proxynorm as kp

SCRIPT = ROOT / "examples" / "finetune.py"


@pytest.fixture(scope="module")
def finetune():
    return load_script(SCRIPT)


def write_folder(folder, classes, images):
    random = np.random.default_rng(0)
    for index in range(classes):
        for number in range(images):
            path = folder / f"class_{index}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Class by brightness, so that a label can be told from its image.
            image = random.integers(0, 10, (20, 30, 3)) + 60 * index
            tf.io.write_file(str(path), tf.io.encode_png(image.astype("uint8")))
    return folder


def arguments(finetune, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, options)])
    return finetune.parse_arguments()


def test_digits(finetune):
    images, labels, names = finetune.load_digit_images(40)
    assert images.shape == (1797, 40, 40, 3) and images.dtype == np.float32
    assert images.min() == -1 and images.max() == 1
    assert labels.shape == (1797,) and len(names) == 10


def test_tasks_share_no_classes_and_no_images(finetune):
    labels = np.repeat(np.arange(5), 10)
    images = np.arange(50.0)
    old, new = finetune.make_tasks(images, labels, list("abcde"), 3, seed=0)
    assert (old.classes, new.classes) == (["a", "b", "c"], ["d", "e"])
    parts = [old.train_images, old.test_images, new.train_images, new.test_images]
    assert np.array_equal(np.sort(np.concatenate(parts)), images)
    assert np.array_equal(np.bincount(new.train_labels), [3, 3])
    assert np.array_equal(new.train_images // 10 - 3, new.train_labels)
    assert np.array_equal(new.test_images // 10 - 3, new.test_labels)


def test_folder(finetune, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "images", classes=4, images=6)
    options = arguments(
        finetune, monkeypatch, "--images", folder, "--images-per-class", 2, "--output", tmp_path / "out"
    )
    old, new = finetune.load_tasks(options)
    assert old.classes == ["class_0", "class_1"] and new.classes == ["class_2", "class_3"]
    assert new.train_images.shape == (4, 40, 40, 3) and len(new.test_images) == 8
    assert old.train_images.min() >= -1 and new.train_images.max() <= 1
    assert np.array_equal(new.test_images.mean(axis=(1, 2, 3)) > 0.2, new.test_labels == 1)


@pytest.mark.parametrize(("classes", "images"), [(3, 9), (4, 4), (4, 6)])
def test_folder_that_is_too_small(finetune, tmp_path, monkeypatch, classes, images):
    folder = write_folder(tmp_path / "images", classes, images)
    options = arguments(
        finetune, monkeypatch, "--images", folder, "--images-per-class", 5, "--output", tmp_path / "out"
    )
    with pytest.raises(SystemExit, match=f"There are {classes} classes, the smallest with {images} images"):
        finetune.load_tasks(options)


@pytest.mark.parametrize(
    "options", [("--size", 16), ("--epochs", 1), ("--images", "missing"), ("--images-per-class", 0)]
)
def test_bad_options(finetune, monkeypatch, capsys, options):
    with pytest.raises(SystemExit):
        arguments(finetune, monkeypatch, *options)
    assert f"error: {options[0]} must be" in capsys.readouterr().err


def test_output_is_not_overwritten(finetune, tmp_path, monkeypatch, capsys):
    (tmp_path / "pretrained.keras").write_text("mine")
    with pytest.raises(SystemExit):
        arguments(finetune, monkeypatch, "--output", tmp_path)
    assert "must be a new or an empty directory" in capsys.readouterr().err


def test_contenders(finetune):
    model = finetune.build_model(32, 3)
    replaced = finetune.replace_batch_norm(model)
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in replaced.layers)
    assert sum(isinstance(layer, kp.GroupNormProxy) for layer in replaced.layers) == 27
    assert all(layer.trainable for layer in finetune.keep_batch_norm(model).layers)
    frozen = [layer.name for layer in finetune.freeze_batch_norm(model).layers if not layer.trainable]
    assert len(frozen) == 27 and all(name.endswith("_bn") for name in frozen)
    finetuned = finetune.with_new_head(model, 4)
    assert finetuned.output_shape == (None, 4)
    assert [layer.name for layer in finetuned.layers[:-1]] == [layer.name for layer in model.layers[:-1]]


@pytest.mark.slow
def test_script(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pretrained.keras", "finetuned.keras"}
    rows = {line[:12].strip(): line[12:].split() for line in done.stdout.splitlines() if line[12:22].strip() == "2"}
    after = {name: float(cells[3]) for name, cells in rows.items()}
    assert list(after) == ["BN", "BN frozen", "GN+PN"]
    assert after["GN+PN"] > after["BN"] + 0.2 and after["GN+PN"] > 0.7
