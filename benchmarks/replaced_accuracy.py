"""Measures what accuracy a trained network keeps when its batch norm is replaced, before any further training.

    python3 -m pip install -e ".[examples]"
    python3 benchmarks/replaced_accuracy.py  # trains six networks first, or reads them: --pretrained FOLDER

The networks are those that `finetuning.py` pretrains, tested on the classes that they were trained for: with batch
norm, and with each replacement of `keras_proxynorm.replace_normalization`, as it is, with `compensate=True`, and with
`calibrate=images`, 256 of the training images.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import classifiers
import finetuning
import grids
import keras
import networks
from measurement import write_results

from keras_proxynorm import replace_normalization

RESULTS = grids.RESULTS / "replaced_accuracy.csv"
NORMALIZATIONS = ("group_norm_proxy", "layer_norm_proxy", "group_norm", "layer_norm")
WAYS = ("copied", "compensate", "calibrate")
CALIBRATION_IMAGES = 256


def measure(network, seed, cache, folder):
    """The test accuracy of a network, by normalization and way."""
    keras.utils.clear_session()
    data, _ = finetuning.load_old_task(folder)
    arguments = {
        "copied": {},
        "compensate": {"compensate": True},
        "calibrate": {"calibrate": data.train.images[:CALIBRATION_IMAGES]},
    }
    source = finetuning.pretrained(network, seed, cache, folder)
    models = {("batch_norm", "copied"): source}
    for name, way in itertools.product(NORMALIZATIONS, WAYS):
        if way != "compensate" or name.endswith("proxy"):  # without proxy normalization there is nothing to undo
            models[name, way] = replace_normalization(source, name, **networks.GROUPS, **arguments[way])
    return {key: finetuning.accuracy_on_old_task(model, folder) for key, model in models.items()}


def main():
    """Writes the file anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    finetuning.add_arguments(parser)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="CSV", help=f"default: {RESULTS.name}")
    arguments = parser.parse_args()
    folder = classifiers.check_fashion_mnist(parser, arguments.fashion_mnist)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.pretrained or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        for network, seed in itertools.product(finetuning.NETWORKS, grids.SEEDS):
            for (normalization, way), accuracy in measure(network, seed, cache, folder).items():
                about = {"network": network, "normalization": normalization, "way": way, "seed": seed}
                found = {"test_accuracy": round(accuracy, 4), "versions": classifiers.describe_versions()}
                rows.append({**about, **found})
                print(f"{network}, seed {seed}, {normalization}, {way}: {accuracy:.3f}", flush=True)
    write_results(arguments.output, rows)


if __name__ == "__main__":
    main()
