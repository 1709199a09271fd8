"""The parts of benchmarks/tpu_compile.py and, as they are slow, the train steps of three blocks through the compiler.

ResNet50V2 takes the compiler half an hour: run the script for it, which fails if a limit is exceeded.
"""

import importlib.util
import sys

import keras
import pytest
from backends import tensorflow_only
from scripts import load_script

import keras_proxynorm as kp

pytestmark = tensorflow_only

needs_compiler = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("jax", "libtpu"))), reason="needs jax and libtpu"
)


@pytest.fixture(scope="module")
def benchmark():
    return load_script("benchmarks/tpu_compile.py")


@pytest.fixture(scope="module")
def measured(benchmark):
    """The statistics of the three blocks; each is compiled once, for whichever test asks for it first."""
    known = {}

    def measure(normalization, precision):
        key = (normalization, precision)
        if key not in known:
            known[key] = benchmark.measure("blocks", normalization, precision)
        return known[key]

    return measure


def make_statistics(benchmark, bytes_accessed, temporary_bytes=1000):
    return benchmark.Statistics(bytes_accessed, temporary_bytes, flops=0, compile_seconds=1.5)


def test_normalizations(benchmark):
    blocks = benchmark.build_blocks()
    stock = benchmark.replace_batch_norm(blocks, "group_norm")
    found = [layer for layer in stock.layers if isinstance(layer, keras.layers.GroupNormalization)]
    assert [layer.groups for layer in found] == [32] * 3
    assert sum(isinstance(layer, keras.layers.ReLU) for layer in stock.layers) == 3
    proxied = benchmark.replace_batch_norm(blocks, "group_norm_proxy")
    found = [layer for layer in proxied.layers if isinstance(layer, kp.GroupNormProxy)]
    assert [(layer.groups, layer.activation.__name__) for layer in found] == [(32, "relu")] * 3
    assert len(proxied.layers) == len(blocks.layers) - 3


def test_ratios_and_limits(benchmark):
    results = {
        ("blocks", "float32", "batch_norm"): make_statistics(benchmark, 1000),
        ("blocks", "float32", "group_norm"): make_statistics(benchmark, 2000),
        ("blocks", "float32", "group_norm_proxy"): make_statistics(benchmark, 1010, temporary_bytes=1020),
        ("resnet50v2", "float32", "group_norm_proxy"): make_statistics(benchmark, 2000),
    }
    assert [benchmark.ratio(results, key, "bytes_accessed") for key in results] == [1, 2, 1.01, None]
    assert benchmark.excesses(results) == []
    results["blocks", "float32", "layer_norm_proxy"] = make_statistics(benchmark, 1011, temporary_bytes=1021)
    found = benchmark.excesses(results)
    assert len(found) == 2
    assert found[0] == "blocks float32 layer_norm_proxy: bytes_accessed is 1.0110 of batch norm's; the limit is 1.01"


def test_results_stay_until_they_are_measured_again(benchmark, tmp_path):
    path = tmp_path / "results" / "results.csv"
    assert benchmark.read_results(path) == {}
    results = {
        ("resnet50v2", "float32", "batch_norm"): make_statistics(benchmark, 3000),
        ("blocks", "mixed_bfloat16", "group_norm_proxy"): make_statistics(benchmark, 1005),
        ("blocks", "mixed_bfloat16", "batch_norm"): make_statistics(benchmark, 1000),
    }
    benchmark.write_results(path, results)
    assert benchmark.read_results(path) == results
    header, *rows = path.read_text().splitlines()
    assert header.startswith("model,precision,normalization,bytes_accessed,temporary_bytes,")
    assert rows[1] == "blocks,mixed_bfloat16,group_norm_proxy,1005,1000,0,1.5,1.0050,1.0000"


def test_missing_compiler(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tpu_compile.py"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else name)
    with pytest.raises(SystemExit, match=r'pip install "keras_proxynorm\[tpu\]"'):
        benchmark.main()


def test_failure_names_its_cause(benchmark):
    with pytest.raises(RuntimeError, match="compile_for_tpu.py failed:\n(.|\n)*Error"):
        benchmark.compile_for_tpu(b"no module")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("normalization", ["group_norm_proxy", "layer_norm_proxy"])
def test_blocks_cost_what_batch_norm_costs(measured, normalization, precision):
    batch_norm, proxied = measured("batch_norm", precision), measured(normalization, precision)
    assert proxied.bytes_accessed <= 1.01 * batch_norm.bytes_accessed
    assert proxied.temporary_bytes <= 1.02 * batch_norm.temporary_bytes


@pytest.mark.slow
@needs_compiler
def test_barriers_and_copies(benchmark):
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    @tf.function(jit_compile=True)
    def function(x):
        return gen_xla_ops.xla_optimization_barrier(input=[x, x @ x])

    hlo = function.experimental_get_compiler_ir(tf.ones((256, 256)))(stage="hlo_serialized")
    statistics = benchmark.compile_for_tpu(hlo)
    assert statistics.bytes_accessed >= 2 * 4 * 256**2
    assert statistics.flops >= 2 * 256**3
