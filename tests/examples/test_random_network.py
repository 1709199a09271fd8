"""That examples/random_network.py shows what the paper shows: the numbers of its figure, and the files."""

import csv
import sys

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from scripts import ROOT, load_script

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

pytestmark = tensorflow_only

SCRIPT = ROOT / "examples" / "random_network.py"
DEPTH, WIDTH = 32, 64


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def fractions(script):
    images = script.load_images(None, 8, 32, seed=0)
    return {norm: result.fractions for norm, result in script.measure(images, DEPTH, WIDTH, seed=0).items()}


def test_layer_norm_collapses_as_the_theorem_says(script, fractions):
    p1 = fractions["LN"][:, 0]
    assert script.lower_bound(DEPTH)[0] == 0 and script.lower_bound(20)[-1] == pytest.approx(0.51, abs=0.005)
    assert (p1 >= script.lower_bound(DEPTH)).all()
    assert p1[-1] > 0.85  # of 64 channels; of 128 above 0.95
    assert fractions["GN(8)"][-1, 0] > 0.5


def test_proxy_norm_prevents_it(fractions):
    for norm in ("LN+PN", "GN(8)+PN"):
        assert fractions[norm][-1, 0] < 0.05
        assert fractions[norm][:, 0].max() < 0.25


def test_weight_standardization_prevents_it_in_part(fractions):
    assert fractions["LN+PN"][-1, 0] < fractions["LN+WS"][-1, 0] < fractions["LN"][-1, 0] / 2


def test_batch_norm_has_no_channel_means(fractions):
    assert fractions["BN"][:, 0].max() < 1e-6
    assert fractions["BN"][-1, 2] > 0.85


def test_instance_norm_makes_samples_alike(fractions):
    assert (fractions["IN"][:, 1] + fractions["IN"][:, 3]).max() < 1e-3
    for norm in set(fractions) - {"IN"}:
        assert fractions[norm][-1, 1] + fractions[norm][-1, 3] > fractions["IN"][-1, 1] + fractions["IN"][-1, 3]


def test_networks_have_the_same_weights(script):
    networks = [script.build_network(norm, (8, 8, 1), 2, 16, seed=1) for norm in ("BN", "LN", "GN(8)+PN")]
    for name in ("kernel", "gamma", "beta"):
        first, *others = ([w.numpy() for w in network.weights if w.name == name] for network in networks)
        assert len(first) == 2
        for other in others:
            assert all(map(np.array_equal, first, other))


def test_weight_standardization(script):
    kernel = script.standardize(np.random.default_rng(0).normal(3, 2, (3, 3, 8, 4)))
    np.testing.assert_allclose(kernel.mean(axis=(0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(kernel.var(axis=(0, 1, 2)), 1 / 72)


def test_padding_is_periodic(script):
    x = np.arange(12.0).reshape(1, 3, 4, 1)
    padded = keras.ops.convert_to_numpy(script.PeriodicPadding()(x))[0, ..., 0]
    np.testing.assert_array_equal(padded, np.pad(x[0, ..., 0], 1, mode="wrap"))


def test_files(script, monkeypatch, tmp_path, capsys):
    options = ["--depth", "3", "--width", "16", "--count", "8", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["random_network.py", *options])
    script.main()
    assert "P1/P2/P3/P4 at layer 3" in capsys.readouterr().out
    with (tmp_path / "out" / "random_network.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 * 3
    for row in rows:
        assert sum(float(row[f"P{i}"]) for i in range(1, 5)) == pytest.approx(1, abs=1e-5)
    png = (tmp_path / "out" / "random_network.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    # What is there is not replaced unasked.
    with pytest.raises(SystemExit):
        script.main()
    assert "exists; give --overwrite to replace it" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--width", "20"), ("--depth", "1"), ("--images", "missing"), ("--count", "1")])
def test_bad_options(script, monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["random_network.py", *options])
    with pytest.raises(SystemExit):
        script.parse_arguments()
    assert f"error: {options[0]} must be" in capsys.readouterr().err
