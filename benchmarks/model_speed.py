"""Times whole training steps of models with batch norm, Keras's group norm, proxy normalization, and no normalization.

    python benchmarks/model_speed.py

takes half an hour. Each step is what `fit` runs, on images of 128x128 pixels. The contenders take turns
in one process; the peak memory of each is that of a process of its own. "share" is what the normalization costs, the
time beyond that of the model without any, as a ratio to what Keras's group norm costs.
"""

import argparse
import os
import resource

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from measurement import in_own_process, medians_in_turns, results_file, set_threads, write_results

MODELS = ["ResNet50V2", "EfficientNetB0"]
BATCH_SIZES = [8, 32]
NORMALIZATIONS = ["batch_norm", "group_norm", "group_norm_proxy", "none"]
IMAGE_SIZE = 128
CLASSES = 100


def build(name, normalization):
    """A classifier of keras.applications with a normalization, compiled."""
    import keras
    import networks

    import keras_proxynorm

    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=shape, classes=CLASSES, classifier_activation=None
    )
    if normalization == "none":
        model = keras_proxynorm.replace_normalization(model, networks.identity, weights="fresh")
    elif normalization != "batch_norm":
        model = keras_proxynorm.replace_normalization(model, normalization, weights="fresh")
    model.compile(
        keras.optimizers.SGD(1e-3, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def training_step(name, normalization, batch_size):
    """The training step on one batch as a function without arguments."""
    import keras

    model = build(name, normalization)
    images = keras.random.uniform((batch_size, IMAGE_SIZE, IMAGE_SIZE, 3), maxval=255.0, seed=0)
    labels = keras.random.randint((batch_size,), 0, CLASSES, seed=1)
    return lambda: model.train_on_batch(images, labels)


def start(threads, precision):
    """Settings of a fresh process."""
    set_threads(threads)
    import keras

    keras.config.set_dtype_policy(precision)


def measure_times(threads, precision, name, batch_size, repeats):
    """Median seconds of a step with each normalization, in turns."""
    start(threads, precision)
    steps = {norm: training_step(name, norm, batch_size) for norm in NORMALIZATIONS}
    return medians_in_turns(steps, repeats)


def measure_memory(threads, precision, name, batch_size, normalization):
    """Peak memory in MB of a process that runs some steps."""
    start(threads, precision)
    step = training_step(name, normalization, batch_size)
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(threads, precision, name, batch_size, repeats):
    """A row for each normalization."""
    times = in_own_process(measure_times, threads, precision, name, batch_size, repeats)
    rows = []
    for normalization in NORMALIZATIONS:
        share = (times[normalization] - times["none"]) / (times["group_norm"] - times["none"])
        rows.append(
            {
                "model": name,
                "batch_size": batch_size,
                "normalization": normalization,
                "threads": threads,
                "precision": precision,
                "repeats": repeats,
                "milliseconds": round(1e3 * times[normalization], 2),
                "to_batch_norm": round(times[normalization] / times["batch_norm"], 3),
                "share": round(share, 3),
                "peak_memory_mb": round(
                    in_own_process(measure_memory, threads, precision, name, batch_size, normalization)
                ),
            }
        )
    return rows


def print_rows(rows):
    """A block of the table."""
    for row in rows:
        print(
            f"{row['model']:<16}{row['batch_size']:>6}  {row['normalization']:<18}{row['milliseconds']:>10.1f}"
            f"{row['to_batch_norm']:>8.2f}{row['share']:>8.2f}{row['peak_memory_mb']:>10}",
            flush=True,
        )


def main():
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: both")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES, help="default: 8 32")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--precision", default="float32", help="a dtype policy; default: float32")
    parser.add_argument("--repeats", type=int, default=15, help="turns that are measured; default: 15")
    arguments = parser.parse_args()
    threads = "1thread" if arguments.threads == 1 else f"{arguments.threads}threads"
    output = results_file("model_speed", threads, arguments.precision)
    print(f"{'model':<16}{'batch':>6}  {'normalization':<18}{'ms':>10}{'/BN':>8}{'share':>8}{'peak MB':>10}")
    for name in arguments.models:
        for batch_size in arguments.batch_sizes:
            rows = measure(arguments.threads, arguments.precision, name, batch_size, arguments.repeats)
            print_rows(rows)
            write_results(output, rows, keys=("model", "batch_size"))
    print(f"Written to {os.path.relpath(output)}; its rows for other models and batch sizes are as they were.")


if __name__ == "__main__":
    main()
