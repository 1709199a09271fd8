"""Trains a network with Proxy Normalization in several processes, of one machine or of many, on Keras's JAX backend.

    pip install "keras_proxynorm[examples,jax]"
    python distributed.py --local  # two processes on this machine, on CPUs, to see it work

    python distributed.py --coordinator 10.0.0.1:1234 --processes 2 --process-id 0  # on the machine 10.0.0.1
    python distributed.py --coordinator 10.0.0.1:1234 --processes 2 --process-id 1  # on another machine

Each process uses all devices of its machine, and takes its share of every batch. Without these arguments it is one
process: the way to go for several GPUs in one machine. Instead of arguments it takes Keras's environment variables,
KERAS_DISTRIBUTION_JOB_ADDRESSES, KERAS_DISTRIBUTION_NUM_PROCESSES and KERAS_DISTRIBUTION_PROCESS_ID.

The normalizations compute statistics of one sample at a time, so how samples are distributed over devices makes no
difference. Only gradients are summed over devices, as for a network without normalization.

The data (1797 grey images of 8x8 pixels) comes with scikit-learn; nothing is downloaded. Two local processes on two
cores take less than a minute.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# Read when TensorFlow is imported, which Keras may do for its tools: print errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Whatever the user's default is: of Keras's backends, only JAX trains on several machines.
os.environ["KERAS_BACKEND"] = "jax"

if not importlib.util.find_spec("jax"):
    sys.exit('This example needs JAX: pip install "keras_proxynorm[jax]"')
if not importlib.util.find_spec("sklearn"):
    sys.exit('This example needs scikit-learn: pip install "keras_proxynorm[examples]"')

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_proxynorm import GroupNormProxy, LayerNormProxy, exclude_norm_from_weight_decay

ENVIRONMENT = {
    "coordinator": "KERAS_DISTRIBUTION_JOB_ADDRESSES",
    "processes": "KERAS_DISTRIBUTION_NUM_PROCESSES",
    "process_id": "KERAS_DISTRIBUTION_PROCESS_ID",
}


class ShareOfBatches(keras.utils.PyDataset):
    """The part of every batch that is for this process. All processes shuffle alike, so that the parts fit together."""

    def __init__(self, images, labels, batch_size, process_id, processes, seed):
        super().__init__()
        self.images, self.labels = images, labels
        self.batch_size = batch_size
        self.process_id, self.processes = process_id, processes
        self.random = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        # Full batches only: a process with a step more than the others would wait for them.
        return len(self.images) // self.batch_size

    def __getitem__(self, index):
        batch = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        share = np.split(batch, self.processes)[self.process_id]
        return self.images[share], self.labels[share]

    def on_epoch_end(self):
        self.order = self.random.permutation(len(self.images))


def load_data(seed):
    digits = load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype("float32")
    return train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed)


def build_model():
    # No bias in the convolutions: the normalizations that follow would remove it.
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            GroupNormProxy(groups=8),
            layers.Conv2D(64, 3, strides=2, padding="same", use_bias=False),
            GroupNormProxy(groups=8),
            layers.Conv2D(64, 3, padding="same", use_bias=False),
            LayerNormProxy(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, name="logits"),
        ]
    )


def train(dataset, epochs, verbose):
    model = build_model()
    rate = keras.optimizers.schedules.CosineDecay(3e-3, epochs * len(dataset))
    optimizer = keras.optimizers.AdamW(rate, weight_decay=1e-2)
    model.compile(
        # Kernels and proxies decay, gamma and beta do not.
        optimizer=exclude_norm_from_weight_decay(optimizer, model),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(dataset, epochs=epochs, shuffle=False, verbose=verbose)
    return [keras.ops.convert_to_numpy(weight) for weight in model.weights]


def digests_of_processes(weights):
    """A SHA-256 digest of the weights of each process, the same ones in all processes."""
    digest = hashlib.sha256(b"".join(weight.tobytes() for weight in weights)).digest()
    # As 32-bit numbers, because by default JAX converts 64-bit ones to these.
    gathered = multihost_utils.process_allgather(np.frombuffer(digest, "uint32"))
    return [row.tobytes().hex() for row in np.reshape(gathered, (jax.process_count(), -1))]


def run_process(arguments):
    processes, process_id = arguments.processes, arguments.process_id
    name = f"Process {process_id} of {processes}"
    if processes > 1:
        print(f"{name}: waiting for all to reach {arguments.coordinator}", flush=True)
        # For processes without an accelerator; for GPUs and TPUs JAX chooses.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keras.distribution.initialize(arguments.coordinator, processes, process_id)
    # All processes draw the same weights and batches.
    keras.utils.set_random_seed(arguments.seed)
    train_images, test_images, train_labels, test_labels = load_data(arguments.seed)

    devices = keras.distribution.list_devices()
    if arguments.batch_size % len(devices):
        sys.exit(f"--batch-size must be a multiple of the {len(devices)} devices, not {arguments.batch_size}")
    here, kind = jax.local_device_count(), jax.devices()[0].device_kind
    share = arguments.batch_size // processes
    print(f"{name}: has {here} of {len(devices)} devices ({kind}), and {share} images of each batch", flush=True)

    dataset = ShareOfBatches(train_images, train_labels, arguments.batch_size, process_id, processes, arguments.seed)
    # Not sharded by Keras, because each process loads its own share and nothing else.
    with keras.distribution.DataParallel(auto_shard_dataset=False).scope():
        weights = train(dataset, arguments.epochs, verbose=2 if process_id == 0 else 0)

    if processes > 1:
        digests = digests_of_processes(weights)
        if len(set(digests)) > 1:
            sys.exit(f"{name}: the weights of the processes are not the same: {', '.join(digests)}")
        print(f"{name}: the weights are bitwise equal to those of all others; SHA-256 {digests[process_id][:16]}...")
    if process_id == 0:
        # Outside of the distribution's scope, this is a model on one device.
        model = build_model()
        model.set_weights(weights)
        accuracy = np.mean(model.predict(test_images, verbose=0).argmax(axis=-1) == test_labels)
        print(f"Test accuracy {accuracy:.4f} on {len(test_images)} images")
        if arguments.output is not None:
            model.save(arguments.output)
            print(f"Model in {arguments.output}")


def run_locally(arguments):
    """Starts the processes on this machine; returns the exit status of one that failed, or else 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, __file__, "--coordinator", coordinator, "--processes", arguments.local]
    for option in ("epochs", "batch_size", "seed", "output"):
        if getattr(arguments, option) is not None:
            command += [f"--{option.replace('_', '-')}", getattr(arguments, option)]
    # Several processes cannot share a GPU, at least not as JAX uses it.
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}
    processes = []
    try:
        for process_id in range(arguments.local):
            options = [*map(str, command), "--process-id", str(process_id)]
            processes.append(subprocess.Popen(options, env=environment))
        # Stop when one fails, because the others would wait for it for minutes.
        while not any(statuses := [process.poll() for process in processes]) and None in statuses:
            time.sleep(0.1)
        return next(filter(None, statuses), 0)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def complete_from_environment(parser, arguments):
    """Fills in what Keras's environment variables say; of one process if there are no arguments and no variables."""
    for name, variable in ENVIRONMENT.items():
        if getattr(arguments, name) is None and variable in os.environ:
            value = os.environ[variable]
            if name != "coordinator" and not re.fullmatch(r"-?\d+", value):
                parser.error(f"{variable} must be a whole number, not {value!r}")
            setattr(arguments, name, value if name == "coordinator" else int(value))
    missing = [name for name in ENVIRONMENT if getattr(arguments, name) is None]
    if len(missing) == len(ENVIRONMENT):
        arguments.processes, arguments.process_id = 1, 0
    elif missing:
        parser.error(
            "several processes need --coordinator, --processes and --process-id, or the environment variables "
            f"{', '.join(ENVIRONMENT.values())}; missing: {', '.join(ENVIRONMENT[name] for name in missing)}"
        )


def check(parser, arguments):
    """Ends the program, with a message, for values that cannot work."""
    for name, lowest in (("local", 2), ("processes", 1), ("epochs", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            parser.error(f"--{name.replace('_', '-')} must be at least {lowest}, not {value}")
    processes = arguments.local or arguments.processes
    if not arguments.local and not 0 <= arguments.process_id < processes:
        parser.error(f"--process-id must be from 0 to {processes - 1}, not {arguments.process_id}")
    if arguments.coordinator is not None and not re.fullmatch(r"[^\s,]+:\d+(,[^\s,]+:\d+)*", arguments.coordinator):
        parser.error(f"--coordinator must be an address and a port, as 10.0.0.1:1234, not {arguments.coordinator!r}")
    if arguments.batch_size % processes:
        parser.error(f"--batch-size must be a multiple of the {processes} processes, not {arguments.batch_size}")
    if arguments.output is not None and arguments.output.suffix != ".keras":
        parser.error(f"--output must be a file that ends in .keras, not {arguments.output}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--local",
        type=int,
        nargs="?",
        const=2,
        metavar="N",
        help="start N processes on this machine; 2 if N is left out",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, any port that is free there")
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are in all")
    parser.add_argument("--process-id", type=int, metavar="ID", help="which of them this is, from 0")
    parser.add_argument("--epochs", type=int, default=10, help="default: 10")
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together; default: 64")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches; default: 0")
    parser.add_argument("--output", type=Path, metavar="FILE.keras", help="where process 0 saves the model, if given")
    arguments = parser.parse_args()
    if arguments.local is None:
        complete_from_environment(parser, arguments)
    elif any(getattr(arguments, name) is not None for name in ENVIRONMENT):
        parser.error("--local must go without --coordinator, --processes and --process-id")
    check(parser, arguments)
    return arguments


def main():
    arguments = parse_arguments()
    if arguments.local is not None:
        # End as with Ctrl-C, together with the processes.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        sys.exit(run_locally(arguments))
    run_process(arguments)


if __name__ == "__main__":
    main()
