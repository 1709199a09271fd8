"""Trains the proxy-normalized model on JAX as one of several processes, and the first of them once more alone.

Run as `python -m distribution.train_jax OUTPUT.npz ADDRESS PROCESSES PROCESS_ID`.
"""

import sys

import jax
import keras
import numpy as np
from distribution import samples


def share_of_batches(array, process_id, processes):
    """Every batch split into as many parts as there are processes, and of each the part of this process."""
    parts = np.split(array, len(array) * processes // samples.BATCH_SIZE)
    return np.concatenate(parts[process_id::processes])


def train(process_id=0, processes=1):
    images, labels = (share_of_batches(array, process_id, processes) for array in samples.data())
    return samples.fit(samples.model(samples.PROXY_NORM), images, labels, samples.BATCH_SIZE // processes)


def main():
    output, address = sys.argv[1:3]
    processes, process_id = map(int, sys.argv[3:])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize(address, processes, process_id)
    assert jax.process_count() == processes and len(jax.local_devices()) == 1
    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    with distribution.scope():
        results = {
            "together": train(process_id, processes),
            # The share of the first process for all of them. Those are other batches, and the weights must tell.
            "together with one share": train(0, processes),
        }
    if process_id == 0:
        # Here, as a process that starts for it would take longer. The others do nothing meanwhile.
        results["alone"] = train()
    np.savez(output, **{f"{name}/{key}": value for name, result in results.items() for key, value in result.items()})


if __name__ == "__main__":
    main()
