"""Measures what accuracy a trained network keeps when its batch norm is replaced, before any further training.

    python3 -m pip install -e ".[examples]"
    python3 benchmarks/replaced_accuracy.py  # trains six networks first, or reads them: --pretrained FOLDER

The networks are those that `finetuning.py` pretrains, tested on the classes that they were trained for: with batch
norm, and with what `keras_proxynorm.replace_normalization` puts in its place, as it is, with `compensate=True`, and
with `calibrate=images`, 256 of the images they were trained with.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import accuracy
import finetuning
from measurement import write_results
from rate_search import SEEDS

RESULTS = accuracy.RESULTS.with_name("replaced_accuracy.csv")
COLUMNS = ("network", "normalization", "way", "seed", "test_accuracy", "versions")
NORMALIZATIONS = ("group_norm_proxy", "layer_norm_proxy", "group_norm", "layer_norm")
WAYS = ("copied", "compensate", "calibrate")
CALIBRATION_IMAGES = 256


def measure(network, seed, cache, folder):
    """The test accuracy of a network, by normalization and way."""
    import compare
    import keras

    from keras_proxynorm import replace_normalization

    keras.utils.clear_session()
    data, *_ = finetuning.load_task(False, finetuning.PRETRAINING, 0, folder)
    arguments = {
        "copied": {},
        "compensate": {"compensate": True},
        "calibrate": {"calibrate": data.train_images[:CALIBRATION_IMAGES]},
    }
    source = finetuning.pretrained(network, seed, cache, folder)
    models = {("batch_norm", "copied"): source}
    for name, way in itertools.product(NORMALIZATIONS, WAYS):
        if way != "compensate" or name.endswith("proxy"):  # without proxy normalization there is nothing to undo
            models[name, way] = replace_normalization(source, name, **accuracy.GROUPS, **arguments[way])
    found = {}
    for key, model in models.items():
        compare.compile_model(model, 1.0, 1)
        _, found[key] = model.evaluate(data.test_images, data.test_labels, batch_size=500, verbose=0)
    return found


def main():
    """Writes the file anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with the four IDX files")
    parser.add_argument("--pretrained", type=Path, metavar="FOLDER", help="for files; default: a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="CSV", help=f"default: {RESULTS.name}")
    arguments = parser.parse_args()
    folder = accuracy.checked_fashion_mnist(parser, arguments.fashion_mnist)
    import compare

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.pretrained or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        for network, seed in itertools.product(finetuning.NETWORKS, SEEDS):
            for (normalization, way), value in measure(network, seed, cache, folder).items():
                values = (network, normalization, way, seed, round(value, 4), compare.describe_versions())
                rows.append(dict(zip(COLUMNS, values, strict=True)))
                print(f"{network}, seed {seed}, {normalization}, {way}: {value:.3f}", flush=True)
    write_results(arguments.output, rows)


if __name__ == "__main__":
    main()
