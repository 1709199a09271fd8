"""That examples/normalization_gallery.py measures a model of one's own and writes its files."""

import csv
import sys

import keras
import pytest
from backends import tensorflow_only
from keras import layers
from scripts import ROOT, load_script

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

pytestmark = tensorflow_only

SCRIPT = ROOT / "examples" / "normalization_gallery.py"


def test_own_model(monkeypatch, tmp_path):
    script = load_script(SCRIPT)
    model = keras.Sequential([keras.Input((32, 32, 3))], name="mine")
    for _ in range(2):
        model.add(layers.Conv2D(16, 3))
        model.add(layers.BatchNormalization())
        model.add(layers.ReLU())
    model.save(tmp_path / "model.keras")
    options = ["--model", tmp_path / "model.keras", "--size", 32, "--count", 4, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["normalization_gallery.py", *map(str, options)])
    script.main()
    assert (tmp_path / "out" / "mine.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "mine.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["normalization"] for row in rows] == [n for n in ("BN", "LN", "GN", "LN+PN", "GN+PN") for _ in "12"]
    with pytest.raises(SystemExit, match="exists; give --overwrite to replace it"):
        script.main()


def test_crops():
    script = load_script(SCRIPT)
    images = script.load_images(None, 40, 4, seed=0)
    assert images.shape == (4, 40, 40, 3) and images.max() > 128
    assert (images == script.load_images(None, 40, 4, seed=0)).all()
    assert (images != script.load_images(None, 40, 4, seed=1)).any()


@pytest.mark.slow
def test_networks(tmp_path):
    """Group and layer norm collapse in ResNet50V2, and with proxy normalization they do not."""
    script = load_script(SCRIPT)
    images = script.load_images(None, 96, 32, seed=0) / 127.5 - 1
    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50V2(input_shape=(96, 96, 3), include_top=False, weights=None)
    script.randomize_affine(model, 0.2, 0)
    p1 = {norm: result.fractions[:, 0] for norm, result in script.measure("ResNet50V2", model, images).items()}
    assert (p1["LN"] > 0.5).mean() > 0.8 and p1["LN"].mean() > p1["GN"].mean() > 0.35
    assert p1["LN+PN"].max() < 0.35 and p1["GN+PN"].max() < 0.2
