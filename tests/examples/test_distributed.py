"""The parts of examples/distributed.py, and, as it is slow, all of it, in two processes on this machine."""

import importlib.util
import os
import re
import sys
import time

import keras
import numpy as np
import pytest
from backends import numpy
from distribution.processes import free_address, run_together
from scripts import ROOT, load_script

pytest.importorskip("jax")

SCRIPT = ROOT / "examples" / "distributed.py"
ON_CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
VARIABLES = {
    "coordinator": "KERAS_DISTRIBUTION_JOB_ADDRESSES",
    "processes": "KERAS_DISTRIBUTION_NUM_PROCESSES",
    "process_id": "KERAS_DISTRIBUTION_PROCESS_ID",
}


def load_distributed():
    with pytest.MonkeyPatch.context() as patch:
        # The script sets it, for itself; here it is the one of the tests again.
        patch.setenv("KERAS_BACKEND", keras.backend.backend())
        return load_script(SCRIPT)


@pytest.fixture(scope="module")
def distributed():
    return load_distributed()


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


def arguments(distributed, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["distributed.py", *map(str, options)])
    return distributed.parse_arguments()


def cluster(found):
    return found.coordinator, found.processes, found.process_id


@pytest.mark.parametrize(("module", "extra"), [("jax", "jax"), ("sklearn", "examples")])
def test_missing_package(module, extra, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(SystemExit, match=re.escape(f'pip install "keras_proxynorm[{extra}]"')):
        load_distributed()


def test_cluster_from_arguments(distributed, monkeypatch):
    options = ("--coordinator", "10.0.0.1:1234", "--processes", 4, "--process-id", 3)
    assert cluster(arguments(distributed, monkeypatch, *options)) == ("10.0.0.1:1234", 4, 3)


def test_cluster_from_environment(distributed, monkeypatch):
    for variable, value in zip(VARIABLES.values(), ("10.0.0.1:1234,10.0.0.2:1234", "2", "1"), strict=True):
        monkeypatch.setenv(variable, value)
    assert cluster(arguments(distributed, monkeypatch)) == ("10.0.0.1:1234,10.0.0.2:1234", 2, 1)
    # An argument is meant for this run, a variable for all.
    assert cluster(arguments(distributed, monkeypatch, "--process-id", 0)) == ("10.0.0.1:1234,10.0.0.2:1234", 2, 0)
    local = arguments(distributed, monkeypatch, "--local")
    assert local.local == 2 and cluster(local) == (None, None, None)


def test_one_process_without_arguments(distributed, monkeypatch):
    found = arguments(distributed, monkeypatch)
    assert found.local is None and cluster(found) == (None, 1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--local 1", "--local must be at least 2, not 1"),
        ("--local 3", "--batch-size must be a multiple of the 3 processes, not 64"),
        ("--local 2 --processes 2", "--local must go without --coordinator, --processes and --process-id"),
        ("--processes 2", "missing: KERAS_DISTRIBUTION_JOB_ADDRESSES, KERAS_DISTRIBUTION_PROCESS_ID"),
        ("--coordinator a:1 --processes 2 --process-id 2", "--process-id must be from 0 to 1, not 2"),
        ("--coordinator a:1 --processes 2 --process-id -1", "--process-id must be from 0 to 1, not -1"),
        ("--coordinator a:1 --processes 0 --process-id 0", "--processes must be at least 1, not 0"),
        ("--coordinator a --processes 2 --process-id 0", "--coordinator must be an address and a port"),
        ("--epochs 0", "--epochs must be at least 1, not 0"),
        ("--batch-size 0", "--batch-size must be at least 1, not 0"),
        ("--seed -1", "--seed must be at least 0, not -1"),
        ("--output model.h5", "--output must be a file that ends in .keras, not model.h5"),
    ],
)
def test_bad_options(distributed, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        arguments(distributed, monkeypatch, *options.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_environment(distributed, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLES["processes"], "two")
    with pytest.raises(SystemExit):
        arguments(distributed, monkeypatch)
    assert f"{VARIABLES['processes']} must be a whole number, not 'two'" in capsys.readouterr().err


def test_shares_make_up_the_batches(distributed):
    images, labels = np.arange(14), np.arange(14) % 3
    alone = distributed.ShareOfBatches(images, labels, 4, 0, 1, seed=0)
    shares = [distributed.ShareOfBatches(images, labels, 4, index, 2, seed=0) for index in range(2)]
    epochs = []
    for _ in range(2):
        assert len(alone) == len(shares[0]) == len(shares[1]) == 3
        for batch in range(3):
            parts = [share[batch] for share in shares]
            for whole, *halves in zip(alone[batch], *parts, strict=True):
                assert len(halves[0]) == len(halves[1]) == 2
                assert np.array_equal(whole, np.concatenate(halves))
            assert np.array_equal(alone[batch][1], alone[batch][0] % 3)
        epochs.append(np.concatenate([alone[batch][0] for batch in range(3)]))
        assert len(set(epochs[-1])) == 12
        for dataset in (alone, *shares):
            dataset.on_epoch_end()
    assert not np.array_equal(*epochs)


def test_a_failure_stops_all_processes(distributed, monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "if sys.argv[-1] == '0':\n"
        "    pathlib.Path(__file__).with_name('started').write_text(str(os.getpid()))\n"
        "    time.sleep(300)\n"
        "while not pathlib.Path(__file__).with_name('started').exists():\n"
        "    time.sleep(0.1)\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setattr(distributed, "__file__", str(script))
    start = time.monotonic()
    assert distributed.run_locally(arguments(distributed, monkeypatch, "--local")) == 3
    assert time.monotonic() - start < 100
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "started").read_text()), 0)


def digests(output):
    return re.findall(r"bitwise equal to those of all others; SHA-256 (\w{16})", output)


def accuracy(output):
    return float(re.search(r"Test accuracy (\S+) on 360 images", output)[1])


@pytest.mark.slow
def test_local_processes(distributed, tmp_path):
    model_file = tmp_path / "model.keras"
    (output,) = run_together([SCRIPT, "--local", "--output", model_file], **ON_CPU)
    first, second = digests(output)
    assert first == second
    assert accuracy(output) > 0.97
    # As all that run on TensorFlow: what JAX has trained is a model like any other.
    model = keras.models.load_model(model_file)
    _, images, _, labels = distributed.load_data(seed=0)
    assert np.mean(numpy(model(images)).argmax(axis=-1) == labels) == pytest.approx(accuracy(output), abs=1e-3)


@pytest.mark.slow
def test_processes_of_a_cluster():
    """Started one by one, as on machines of their own."""
    address = free_address()
    options = [SCRIPT, "--epochs", 1, "--processes", 2, "--coordinator", address]
    outputs = run_together([*options, "--process-id", 0], [*options, "--process-id", 1], **ON_CPU)
    (first,), (second,) = map(digests, outputs)
    assert first == second
    assert "Test accuracy" in outputs[0] and "Test accuracy" not in outputs[1]


@pytest.mark.slow
def test_several_devices_in_one_process():
    (output,) = run_together([SCRIPT, "--epochs", 1], **{**ON_CPU, "JAX_NUM_CPU_DEVICES": "2"})
    assert "has 2 of 2 devices" in output and "Test accuracy" in output
