"""Several workers, without synchronizing anything but gradients, end with the weights of one worker."""

import importlib.util
import json

import numpy as np
import pytest
from distribution.processes import free_address, run_together

# Sums of gradients in another order, so off by a few roundings of float32 (6e-8, relative to 1) after 8 steps.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")


def load(path):
    with np.load(path) as file:
        return {name: file[name] for name in file}


def select(results, start):
    chosen = {name.removeprefix(start): value for name, value in results.items() if name.startswith(start)}
    assert chosen
    return chosen


def largest_difference(results, others):
    assert results.keys() == others.keys()
    return max(np.abs(results[name] - others[name]).max() for name in results)


def assert_same(results, others, what):
    difference = largest_difference(select(results, "after/"), select(others, "after/"))
    print(f"{what}: weights differ by at most {difference:.1e}")
    for name in results | others:
        np.testing.assert_allclose(results[name], others[name], err_msg=f"{what}, {name}", **ROUNDING)
    # What was compared is the result of training.
    assert largest_difference(select(results, "before/"), select(results, "after/")) > 0.1
    assert results["loss"][-1] < 0.9 * results["loss"][0]


def assert_different(results, others, what):
    difference = largest_difference(select(results, "after/"), select(others, "after/"))
    print(f"{what}: weights differ by {difference:.1e}")
    assert largest_difference(select(results, "before/"), select(others, "before/")) == 0
    assert difference > 1000 * ROUNDING["atol"]


def test_mirrored(tmp_path):
    """Batch normalization, for comparison, has the statistics of each replica's half."""
    output = tmp_path / "weights.npz"
    command = ["-m", "distribution.train_mirrored", output]
    run_together(command, KERAS_BACKEND="tensorflow", CUDA_VISIBLE_DEVICES="-1")
    results = load(output)
    assert_same(select(results, "proxy_norm/1/"), select(results, "proxy_norm/2/"), "proxy norm, mirrored")
    assert_same(select(results, "calibrated/1/"), select(results, "calibrated/2/"), "calibrated proxies, mirrored")
    assert_different(select(results, "calibrated/2/"), select(results, "proxy_norm/2/"), "calibrated or not, mirrored")
    assert_different(select(results, "batch_norm/1/"), select(results, "batch_norm/2/"), "batch norm, mirrored")


@needs_jax
def test_jax_processes(tmp_path):
    """For comparison, processes that all train on the share of the first."""
    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    address, outputs = free_address(), [tmp_path / "first.npz", tmp_path / "second.npz"]
    commands = [["-m", "distribution.train_jax", path, address, 2, index] for index, path in enumerate(outputs)]
    run_together(*commands, **environment)
    first, second = map(load, outputs)
    for name in second:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    expected = select(first, "alone/")
    assert_same(expected, select(first, "together/"), "proxy norm, two processes")
    assert_different(expected, select(first, "together with one share/"), "proxy norm, two processes with one share")


@needs_jax
def test_forward_has_no_collectives(tmp_path):
    """Batch normalization, for comparison, reduces its mean and its variance over the devices."""
    output, blocks = tmp_path / "collectives.json", 3
    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    run_together(["-m", "distribution.count_collectives", output, blocks], **environment)
    collectives = json.loads(output.read_text())
    print({name: {kind: found.count(kind) for kind in found} for name, found in collectives.items()})
    assert collectives["group_norm_proxy"] == collectives["layer_norm_proxy"] == []
    assert collectives["batch_norm"].count("all-reduce") >= blocks
