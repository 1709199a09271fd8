"""Times a training step of the network of `comparison.py` with each normalization, relative to batch norm.

    python3 benchmarks/normalization_cost.py

takes five minutes. Each step is what `fit` runs, in graph mode, on images of 28x28 pixels. The contenders take turns
in one process; "none" is the network without any normalization, "+sam_on" the step of sharpness-aware minimization,
which computes gradients twice. With small batches most of a step is the overhead of its many small operations.
"""

import argparse
import math
import os

import comparison
import grids
import keras
import tensorflow as tf
from measurement import in_own_process, medians_in_turns, results_file, set_threads, write_results

BATCH_SIZES = [8, 64]
BASELINE = "batch_norm"
IMAGE_SIZE = 28
CLASSES = 10


def training_step(normalization, batch_size):
    """The training step on one batch as a function without arguments, and the number of trainable parameters."""
    keras.utils.set_random_seed(0)
    shape = (IMAGE_SIZE, IMAGE_SIZE, 1)
    network = comparison.build_network(normalization, batch_size, 0, shape, CLASSES)
    model = comparison.for_training(network, normalization)
    model.compile(
        keras.optimizers.SGD(1e-3, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    images = keras.random.normal((batch_size, *shape), seed=0)
    labels = keras.random.randint((batch_size,), 0, CLASSES, seed=1)
    parameters = sum(math.prod(weight.shape) for weight in network.trainable_weights)
    return lambda: model.train_on_batch(images, labels), parameters


def measure(threads, normalizations, batch_size, repeats):
    """A row for each normalization, the steps of which take turns."""
    set_threads(threads)
    # It warns of functions that are traced often, which here are those of many models.
    tf.get_logger().setLevel("ERROR")
    made = {name: training_step(name, batch_size) for name in normalizations}
    medians = medians_in_turns({name: step for name, (step, _) in made.items()}, repeats)
    return [
        {
            "normalization": name,
            "batch_size": batch_size,
            "milliseconds": f"{1e3 * medians[name]:.2f}",
            "ratio_to_batch_norm": f"{medians[name] / medians[BASELINE]:.3f}",
            "parameters": parameters,
            "repeats": repeats,
        }
        for name, (_, parameters) in made.items()
    ]


def main():
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    grids.add_list(parser, "normalizations", comparison.NORMALIZATIONS, choices=comparison.NORMALIZATIONS)
    grids.add_list(parser, "batch-sizes", BATCH_SIZES, int)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--repeats", type=int, default=51, help="turns that are measured; default: 51")
    arguments = parser.parse_args()
    for name in ("batch_sizes", "threads", "repeats"):
        values = getattr(arguments, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {values}")
    # What all are relative to is always among them.
    normalizations = list(dict.fromkeys([BASELINE, *arguments.normalizations]))
    threads = "1thread" if arguments.threads == 1 else f"{arguments.threads}threads"
    output = results_file("normalization_cost", threads, "float32")
    print(f"{'normalization':<32}{'batch':>6}{'ms':>9}{'/BN':>7}{'parameters':>12}")
    for batch_size in arguments.batch_sizes:
        rows = in_own_process(measure, arguments.threads, normalizations, batch_size, arguments.repeats)
        for row in rows:
            print(
                f"{row['normalization']:<32}{batch_size:>6}{row['milliseconds']:>9}"
                f"{float(row['ratio_to_batch_norm']):>7.2f}{row['parameters']:>12}",
                flush=True,
            )
        write_results(output, rows, ["normalization", "batch_size"])
    print(
        f"Written to {os.path.relpath(output)}; its rows about other normalizations and batch sizes are as they were."
    )


if __name__ == "__main__":
    main()
