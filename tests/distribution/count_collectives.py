"""Lists the collective operations in each model's training forward, compiled with its batch sharded over four devices.

Run as `python -m distribution.count_collectives OUTPUT.json BLOCKS`.
"""

import json
import pathlib
import re
import sys

import jax
from distribution import samples
from jax.sharding import NamedSharding, PartitionSpec


def collectives(name, blocks):
    mesh = jax.sharding.Mesh(jax.devices(), ["batch"])
    assert mesh.size == 4
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    model = samples.model([name] * blocks)

    def forward(trainable, non_trainable, images):
        return model.stateless_call(trainable, non_trainable, images, training=True)

    step = jax.jit(forward, in_shardings=(replicated, replicated, sharded))
    weights = ([w.value for w in variables] for variables in (model.trainable_variables, model.non_trainable_variables))
    compiled = step.lower(*weights, samples.data()[0][: samples.BATCH_SIZE]).compile()
    # Were all devices to compute everything, there would be no collectives either.
    logits, _ = compiled.output_shardings
    assert logits.is_equivalent_to(sharded, ndim=2), logits
    # An asynchronous one is two operations, a start and a done.
    names = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    return re.findall(rf" ({names})(?:-start)?\(", compiled.as_text())


def main():
    output, blocks = sys.argv[1:]
    found = {name: collectives(name, int(blocks)) for name in samples.NORMALIZATIONS}
    pathlib.Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
