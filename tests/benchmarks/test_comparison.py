"""The grid of docs/baselines.md: its file, its conditions and its runs."""

import keras
import numpy as np
import pytest
from backends import tensorflow_only
from scripts import ROOT, load_script

pytestmark = tensorflow_only


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield load_script("benchmarks/comparison.py")


def test_the_committed_file_has_every_run(script, monkeypatch, capsys):
    """So what the script writes today has the conditions and the columns of that file."""
    monkeypatch.setattr("sys.argv", ["comparison.py"])
    monkeypatch.setattr(script.classifiers, "check_fashion_mnist", lambda parser, folder: folder)
    monkeypatch.setattr(script.grids, "start_pools", lambda jobs: [])
    file = script.comparison_table.COMPARISON
    content = file.read_bytes()
    script.main()
    assert "All of 57 configurations are done" in capsys.readouterr().out and file.read_bytes() == content


@pytest.mark.parametrize(("batch_size", "window"), [(1, 8), (2, 8), (3, 6), (8, 2), (64, 1)])
def test_window_of_cross_iteration_batch_norm(script, batch_size, window):
    steps = 5 * (6000 // batch_size)
    expected = {"window": window} if window == 1 else {"window": window, "burn_in": steps // 4}
    assert script.arguments_for("cross_iteration_batch_norm", batch_size, steps) == expected
    for name in ("cross_iteration_batch_norm", "cross_iteration_batch_norm+sam_on"):
        assert script.make_configuration(name, batch_size).arguments.startswith(f"window={window}")
    assert script.arguments_for("group_norm", batch_size, steps) == {}


def test_all_start_from_the_same_kernels(script):
    kernels = {}
    for name in ("batch_norm", "none", "group_norm_proxy", "batch_norm+sam_on"):
        keras.utils.set_random_seed(1)
        model = script.build_network(name, 4, 10, (8, 8, 1), 3)
        linear = [layer for layer in model.layers if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))]
        kernels[name] = [keras.ops.convert_to_numpy(layer.kernel) for layer in linear]
        assert len(linear) == 10 and all(map(np.array_equal, kernels[name], kernels["batch_norm"]))


def test_sharpness_aware_minimization_gets_the_model(script, monkeypatch):
    monkeypatch.setattr(script, "SharpnessAwareMinimization", lambda model, **kwargs: (model, kwargs))
    assert script.for_training("model", "batch_norm") == "model"
    assert script.for_training("model", "group_norm+sam_on") == ("model", {"rho": 0.5, "adaptive": "elementwise"})
    assert script.make_configuration("group_norm+sam_on", 8).rho == 0.5
    assert script.make_configuration("group_norm", 8).rho == ""


def test_a_run(script, fashion_mnist, monkeypatch):
    monkeypatch.setattr(script, "SIZES", script.classifiers.Sizes(32, 0, 20, 1))
    monkeypatch.setattr(script, "DEPTH", 3)
    script.load_data.cache_clear()
    data = script.load_data(fashion_mnist)
    assert len(data.train.images) == 32 and len(data.test.images) == 20 and len(data.held_out.images) == 0
    configuration = script.make_configuration("batch_norm+sam_on", 8)
    assert configuration[:8] == ("batch_norm+sam_on", 8, "fashion_mnist", 28, 32, 20, 1, 3)
    result = script.measure(fashion_mnist, script.grids.Run(configuration, 0.1, 0))
    assert 0 <= result.test_accuracy <= 1 and result.seconds > 0 and "keras_proxynorm" in result.versions
    # 9 (16 + 16 32 + 32 64) + 64 10 + 10, and 2 for each of 112 channels.
    assert result.parameters == 23834 + 224


def test_rate_is_proportional_to_the_batch_size(script, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(script.grids, "work", lambda *arguments: given.append(arguments))
    monkeypatch.setattr(script.classifiers, "check_fashion_mnist", lambda parser, folder: folder)
    for options, rate in ((), 0.1), (("--rate", "0.3"), 0.3):
        monkeypatch.setattr("sys.argv", ["comparison.py", "--output", str(tmp_path / "new.csv"), *options])
        script.main()
        configurations, *_, rate_of = given[-1]
        assert {c.batch_size: rate_of(c) for c in configurations} == pytest.approx(
            {2: rate / 32, 8: rate / 8, 64: rate}
        )
