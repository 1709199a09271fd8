"""The benchmark of accuracy: its networks, its data, its runs; and that docs/accuracy.md says what was measured."""

import functools
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from scripts import ROOT, load_script

import keras_proxynorm as kp


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The scripts import each other by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


@pytest.fixture(scope="module")
def script(modules):
    return load_script("benchmarks/accuracy.py")


@pytest.fixture(scope="module")
def report(modules):
    return load_script("benchmarks/accuracy_report.py")


def run_of(script, **changes):
    from grids import Run

    configuration = script.Configuration("digits", "plain15", "group_norm_proxy", 32, 160, 100, 100, 2)
    return Run(configuration._replace(**changes), 0.1, 0)


@pytest.mark.parametrize(
    ("network", "convolutions", "normalizations"),
    [("plain15", 15, 15), ("plain30", 30, 30), ("resnet20", 19 + 2, 19), ("efficientnet", 1 + 6 * 2 + 1, 20)],
)
def test_networks(script, network, convolutions, normalizations):
    source = script.build_model(network, "batch_norm", (28, 28, 1), 10)
    kinds = [type(layer).__name__ for layer in source.layers]
    gates = [layer for layer in source.layers if type(layer) is keras.layers.Conv2D and layer.use_bias]
    assert kinds.count("Conv2D") - len(gates) == convolutions
    assert kinds.count("BatchNormalization") == normalizations
    model = script.build_model(network, "group_norm_proxy", (28, 28, 1), 10)
    layers = [layer for layer in model.layers if isinstance(layer, kp.GroupNormProxy)]
    assert len(layers) == normalizations and {layer.groups for layer in layers} == {8}
    # Those of squeeze and excitation get no PN, nor do the ends of the bottlenecks.
    assert sum(layer.proxy is None for layer in layers) == (6 if network == "efficientnet" else 0)
    assert len(gates) == (12 if network == "efficientnet" else 0)
    without = script.build_model(network, "none", (28, 28, 1), 10)
    assert all(layer.use_bias for layer in without.layers if type(layer) is keras.layers.Conv2D)
    assert not any("Normalization" in type(layer).__name__ for layer in without.layers)


def test_same_kernels_with_each_normalization(script):
    kernels = []
    for name in ("batch_norm", "group_norm_proxy", "none"):
        keras.utils.set_random_seed(0)
        model = script.build_model("efficientnet", name, (28, 28, 1), 10)
        kernels.append([weight for weight in model.trainable_weights if "kernel" in weight.name])
    for other in kernels[1:]:
        for ours, theirs in zip(other, kernels[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_arguments_after_a_colon(script):
    assert script.parse_normalization("none") == ("none", {}, None)
    text = "layer_norm_proxy:proxy_epsilon=0.1,proxy_regularizer='l2',calibrate_proxies=8,learn_proxy=False"
    arguments = {"proxy_epsilon": 0.1, "proxy_regularizer": "l2", "learn_proxy": False}
    assert script.parse_normalization(text) == ("layer_norm_proxy", arguments, 8)
    model = script.build_model("plain15", text, (8, 8, 1), 2)
    layer = next(layer for layer in model.layers if isinstance(layer, kp.LayerNormProxy))
    assert layer.proxy_epsilon == 0.1 and not layer.proxy.trainable and layer.proxy_regularizer is not None


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_one_before(script):
    """Runs of a configuration share a model; the weights, the optimizer and the order start anew."""
    run = run_of(script, normalization="batch_norm")
    first = script.measure(None, run)
    assert 0 <= first.test_accuracy <= 1 and first.seconds > 0
    other = script.measure(None, run._replace(learning_rate=0.3, seed=1))
    assert other[:4] != first[:4]
    assert script.measure(None, run)[:4] == first[:4]
    script.compiled_model.cache_clear()
    assert script.measure(None, run)[:4] == first[:4]


def test_proxies_are_calibrated(script, monkeypatch):
    """Every so many steps the callback is called, on images to train with."""
    given, steps = [], []

    class Recorder(keras.callbacks.Callback):
        def __init__(self, data, every):
            super().__init__()
            given.append((data.shape, every))

        def on_train_batch_end(self, batch, logs=None):
            steps.append(batch + 1)

    monkeypatch.setattr(script, "CalibrateProxies", Recorder)
    # What is called does not depend on the depth.
    monkeypatch.setitem(script.networks.NETWORKS, "plain15", functools.partial(script.networks.plain, depth=3))
    script.measure(None, run_of(script, normalization="group_norm_proxy:groups=4,calibrate_proxies=5"))
    assert given == [((64, 16, 16, 1), 5)] and steps == [5, 10]


@pytest.mark.slow
def test_what_diverges_ends_and_counts(script):
    result = script.measure(None, run_of(script, normalization="none", epochs=3)._replace(learning_rate=1e4))
    assert 0 <= result.held_out_accuracy <= 0.3


@pytest.mark.slow
def test_goes_on(tmp_path):
    """Stopped and called again, it does what is missing, and nothing twice."""
    output = tmp_path / "accuracy.csv"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "accuracy.py"),
        "--datasets",
        "digits",
        "--output",
        str(output),
    ]
    command += ["--normalizations", "batch_norm", "none", "--batch-sizes", "64", "--seeds", "0", "1"]
    command += ["--train-images", "200", "--epochs", "1", "--jobs", "2"]
    first = subprocess.run([*command, "--minutes", "0.01"], capture_output=True, text=True, check=True)
    assert "Run it again to go on." in first.stdout
    lines = output.read_text().splitlines() if output.exists() else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "All of 2 configurations are done" in done.stdout
    assert output.read_text().splitlines()[: len(lines)] == lines
    lines = output.read_text().splitlines()
    assert len(set(lines)) == len(lines) >= 1 + 2 * 4
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.count("\n") == 2 and output.read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--normalizations", "batch"], "--normalizations batch: .*'batch'"),
        (["--normalizations", "group_norm_proxy:proxy_epsilon=-1"], "proxy_epsilon"),
        (["--normalizations", "group_norm_proxy:1"], "NAME:ARGUMENT=VALUE"),
        (["--fashion-mnist", "nowhere"], "nowhere has the four files|nowhere has no"),
        (["--seeds", "0", "0"], "--seeds must be different"),
        (["--epochs", "0"], "--epochs must be positive"),
    ],
)
def test_bad_arguments(script, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    with pytest.raises(SystemExit):
        script.parse_arguments()
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["batch_norm frozen", "group_norm_proxy:calibrate=True"])
def test_finetuning(normalization, fashion_mnist, tmp_path, monkeypatch):
    from grids import Run

    script = load_script("benchmarks/finetuning.py")
    monkeypatch.setattr(script, "PRETRAINING", script.classifiers.Sizes(100, 50, 50, 1))
    configuration = script.Configuration("resnet20", normalization, 2, 20, 20, 1)
    first, again = (script.measure(tmp_path, fashion_mnist, Run(configuration, 0.1, 0)) for _ in range(2))
    assert first[:5] == again[:5]
    assert [file.name for file in tmp_path.glob("*.keras")] == ["resnet20-0-100-50-50-1.keras"]


@pytest.mark.slow
def test_proxy_distance(script, fashion_mnist):
    """It is that of the model that was trained: calibrated proxies are nearer to the data."""
    distances = load_script("benchmarks/proxy_distance.py")
    left, calibrated = (
        distances.measure(
            fashion_mnist, run_of(script, dataset="fashion_mnist", normalization=normalization, train_images=192)
        )
        for normalization in ("layer_norm_proxy", "layer_norm_proxy:calibrate_proxies=1")
    )
    assert 0 < left.mean_distance <= left.largest_mean_distance and 1 <= left.stddev_ratio <= left.largest_stddev_ratio
    assert calibrated.mean_distance < left.mean_distance
    assert 0 <= left.test_accuracy <= 1


@pytest.mark.slow
def test_replaced_accuracy(fashion_mnist, tmp_path, monkeypatch):
    script = load_script("benchmarks/replaced_accuracy.py")
    monkeypatch.setattr(script.finetuning, "PRETRAINING", script.classifiers.Sizes(100, 50, 50, 1))
    monkeypatch.setattr(script, "CALIBRATION_IMAGES", 16)
    found = script.measure("resnet20", 0, tmp_path, fashion_mnist)
    assert len(found) == 1 + 2 * 3 + 2 * 2 and all(0 <= value <= 1 for value in found.values())


def test_tables_are_those_that_were_measured(report):
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.with_tables(page, report.measured_tables()) == page


def test_every_figure_is_in_a_table(report):
    """Those of the page, and what the README takes from it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (of_readme,) = re.findall("^## Does it train as well.*?(?=^## )", readme, re.DOTALL | re.MULTILINE)
    page = report.PAGE.read_text(encoding="utf-8") + of_readme
    tables = " ".join(report.measured_tables().values())
    prose = re.sub(r"<!-- table .*?<!-- end -->|```.*?```|`[^`]*`|\(http[^)]*\)", "", page, flags=re.DOTALL)
    # Accuracies in percent; rates and the like are smaller.
    figures = set(re.findall(r"(?<![\d.])\d\d\.\d(?![\d.])", prose))
    assert len(figures) > 20 and not [figure for figure in figures if figure not in tables]


def test_plots_are_there(report):
    page = report.PAGE.read_text(encoding="utf-8")
    plots = re.findall(r"!\[[^]]*\]\(([^)]*)\)", page)
    assert plots and all((report.PAGE.parent / plot).is_file() for plot in plots)
