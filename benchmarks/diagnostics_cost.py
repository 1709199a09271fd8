"""Times what the callbacks of the diagnostics cost during `fit`, in training steps.

    python benchmarks/diagnostics_cost.py

takes ten minutes. A measurement on a batch and a training step on the same batch take turns in one process.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from measurement import in_own_process, medians_in_turns, results_file, set_threads, write_results

MODELS = ["ResNet50V2", "EfficientNetB0"]
BATCH_SIZE = 32
IMAGE_SIZE = 96
CLASSES = 10


def measure(name, threads, repeats):
    """Median seconds of a training step and of each measurement."""
    set_threads(threads)
    import keras
    import numpy as np

    import keras_proxynorm
    from keras_proxynorm import diagnostics

    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    source = getattr(keras.applications, name)(
        weights=None, input_shape=shape, classes=CLASSES, classifier_activation=None
    )
    model = keras_proxynorm.replace_normalization(source)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), loss)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (BATCH_SIZE, *shape)).astype("float32")
    batch = images, rng.integers(CLASSES, size=BATCH_SIZE)
    return medians_in_turns(
        {
            "training step": lambda: model.train_on_batch(*batch),
            "power_decomposition": lambda: diagnostics.power_decomposition(model, images, verbose=0),
            "signal_propagation": lambda: diagnostics.signal_propagation(model, batch, verbose=0),
            "loss_landscape": lambda: diagnostics.loss_landscape(model, batch),
        },
        repeats,
        warm_up=1,
    )


def main():
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    arguments = parser.parse_args()
    rows = []
    for name in MODELS:
        medians = in_own_process(measure, name, arguments.threads, arguments.repeats)
        step = medians["training step"]
        for what, seconds in medians.items():
            row = {"model": name, "measurement": what, "seconds": f"{seconds:.3f}", "steps": f"{seconds / step:.2f}"}
            rows.append({**row, "batch_size": BATCH_SIZE, "image_size": IMAGE_SIZE, "repeats": arguments.repeats})
            print(f"{name:<16}{what:<22}{seconds:>8.2f} s{seconds / step:>8.2f} training steps", flush=True)
    file = results_file("diagnostics_cost", f"{arguments.threads}threads", "float32")
    write_results(file, rows, ["model", "measurement"])
    print(file)


if __name__ == "__main__":
    main()
