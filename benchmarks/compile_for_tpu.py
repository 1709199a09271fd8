"""Compiles an HLO module for a TPU v5e, which need not be there, and writes what the compiler says of the program.

tpu_compile.py runs it in a process of its own: the environment of the compiler must be set before JAX is imported.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.update(
    # The TPU is only a description; nothing runs.
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    # Compilers do not share a TPU, so they need not wait for each other.
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_LOG_DIR="disabled",
)

from jax.experimental import topologies
from jax.extend.backend import get_compile_options
from jax.extend.mlir import hlo_to_stablehlo, ir
from jax.interpreters import mlir
from jaxlib.xla_client import DeviceList

TOPOLOGY = "v5e:2x2"


def as_stablehlo(hlo):
    """A serialized HLO module as an MLIR module of nothing but StableHLO, which is all that the TPU's client takes."""
    with mlir.make_ir_context():
        module = ir.Module.parse(hlo_to_stablehlo(hlo))
        others = []

        def collect(operation):
            if operation.name.startswith("mhlo."):
                others.append(operation)
            return ir.WalkResult.ADVANCE

        module.operation.walk(collect)
        # StableHLO has no copies, and without layouts they mean nothing.
        unknown = {operation.name for operation in others} - {"mhlo.copy"}
        if unknown:
            raise ValueError(f"No StableHLO is known for the operations {sorted(unknown)} of the HLO module.")
        for copy in others:
            copy.results[0].replace_all_uses_with(copy.operands[0])
            copy.erase()
        return module


def compile_hlo(hlo):
    """What the compiler says of the program for one device: bytes, operations, and the seconds it took."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[0]
    options = get_compile_options(num_replicas=1, num_partitions=1, device_assignment=[[device]])
    module = as_stablehlo(hlo)
    start = time.perf_counter()
    program = device.client.compile(module, DeviceList((device,)), options)
    seconds = time.perf_counter() - start
    costs = program.cost_analysis()
    return {
        "bytes_accessed": int(costs["bytes accessed"]),
        "temporary_bytes": program.get_compiled_memory_stats().temp_size_in_bytes,
        "flops": int(costs.get("flops", 0)),
        "compile_seconds": round(seconds, 1),
    }


def main():
    """Reads the module, compiles it, and writes the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hlo", type=Path, help="a serialized HloModuleProto")
    parser.add_argument("result", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    arguments.result.write_text(json.dumps(compile_hlo(arguments.hlo.read_bytes())))


if __name__ == "__main__":
    main()
