"""Shows what each normalization does to untrained ResNet50V2 and EfficientNetB0.

    pip install "keras_proxynorm[examples,plots]"
    python normalization_gallery.py
    python normalization_gallery.py --images FOLDER --model model.keras  # your own
    python normalization_gallery.py --output docs/figures --overwrite  # the figures of the documentation

Each network is built with batch norm, which `keras_proxynorm.replace_normalization` replaces. Gamma and beta are drawn
at random, as training would move them, and are the same for all. The power of the normalized pre-activations on real
images is then split into four terms, layer by layer: see `random_network.py`. The default images are crops of the two
photographs that come with scikit-learn. It takes a minute on two cores.
"""

import argparse
import csv
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

# Read when TensorFlow is imported: print errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if not all(map(importlib.util.find_spec, ("sklearn", "matplotlib"))):
    sys.exit('This example needs scikit-learn and matplotlib: pip install "keras_proxynorm[examples,plots]"')

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images

from keras_proxynorm import replace_normalization
from keras_proxynorm.diagnostics import collapse_report

NORMALIZATIONS = {
    "BN": None,
    "LN": "layer_norm",
    "GN": "group_norm",
    "LN+PN": "layer_norm_proxy",
    "GN+PN": "group_norm_proxy",
}
NETWORKS = {"ResNet50V2": keras.applications.ResNet50V2, "EfficientNetB0": keras.applications.EfficientNetB0}


def load_images(folder, size, count, seed):
    """Images with channel values from 0 to 255."""
    rng = np.random.default_rng(seed)
    if folder is not None:
        dataset = keras.utils.image_dataset_from_directory(
            folder, labels=None, image_size=(size, size), crop_to_aspect_ratio=True, batch_size=None, seed=seed
        )
        return np.stack(list(dataset.take(count).as_numpy_iterator())).astype("float32")
    photographs, crops = load_sample_images().images, []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        top, left = (rng.integers(0, length - size + 1) for length in photograph.shape[:2])
        crops.append(photograph[top : top + size, left : left + size])
    return np.stack(crops).astype("float32")


def randomize_affine(model, stddev, seed):
    """Draws gamma and beta of all normalization layers."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.name in ("gamma", "beta"):
            weight.assign(rng.normal(float(weight.name == "gamma"), stddev, weight.shape))


def measure(name, source, images):
    """The power decomposition under each normalization."""
    results = {}
    for norm, to in NORMALIZATIONS.items():
        start = time.perf_counter()
        model = source if to is None else replace_normalization(source, to=to)
        # In training mode, so that batch norm uses the statistics of the batch, which has all images.
        report = collapse_report(model, images, training=True, batch_size=len(images), verbose=0)
        results[norm] = report.power
        shares = "/".join(f"{share:.2f}" for share in report.power.fractions.mean(axis=0))
        collapsed = sum(finding.problem == "channel-wise collapse" for finding in report.findings)
        print(
            f"{name:<15}{norm:<7} P1/P2/P3/P4 on average: {shares}   P1 above half in {collapsed} of "
            f"{len(report.names)} layers   ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    return results


def write_csv(file, results):
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["normalization", "layer", "name", "P1", "P2", "P3", "P4", "mean_square"])
        for norm, result in results.items():
            rows = zip(result.names, result.fractions, result.powers, strict=True)
            for i, (name, fractions, powers) in enumerate(rows):
                writer.writerow([norm, i + 1, name, *(f"{x:.6f}" for x in (*fractions, powers.sum()))])


def plot(file, name, results):
    figure, axes = plt.subplots(2, 3, figsize=(9.6, 4.4), dpi=120, layout="constrained", sharex=True, sharey=True)
    for ax, (norm, result) in zip(axes.flat, results.items(), strict=False):
        result.plot(ax, f"{name}, {norm}", legend=False)
        ax.label_outer()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[-1, -1].set_axis_off()
    axes[-1, -1].legend(handles[::-1], labels[::-1], loc="center", frameon=False)
    axes[0, -1].xaxis.set_tick_params(labelbottom=True)
    axes[0, -1].set_xlabel("normalization layer")
    figure.savefig(file)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="default: crops of scikit-learn's photographs")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a .keras file; default: the two networks")
    parser.add_argument("--size", type=int, default=96, help="of the images, in pixels; default: 96")
    parser.add_argument("--count", type=int, default=32, help="of images; default: 32")
    parser.add_argument("--stddev", type=float, default=0.2, help="of gamma and beta; default: 0.2")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the crops; default: 0")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: a new temporary directory")
    parser.add_argument("--overwrite", action="store_true", help="replace files in the output directory")
    arguments = parser.parse_args()
    for name, lowest in (("size", 32), ("count", 2), ("stddev", 0)):
        if getattr(arguments, name) < lowest:
            parser.error(f"--{name} must be at least {lowest}, not {getattr(arguments, name)}")
    if arguments.images is None and arguments.size > 427:
        parser.error(f"--size must be at most 427, the height of the photographs, not {arguments.size}")
    for name, test in (("images", Path.is_dir), ("model", Path.is_file)):
        path = getattr(arguments, name)
        if path is not None and not test(path):
            parser.error(f"--{name}: there is no such {'folder' if name == 'images' else 'file'}, {path}")
    if arguments.output is None:
        arguments.output = Path(tempfile.mkdtemp(prefix="keras_proxynorm-"))
    return arguments


def output_files(arguments, name):
    files = [arguments.output / f"{name}.{kind}" for kind in ("csv", "png")]
    for file in files:
        if file.exists() and not arguments.overwrite:
            sys.exit(f"{file} exists; give --overwrite to replace it")
    return files


def make_networks(arguments):
    if arguments.model is not None:
        model = keras.models.load_model(arguments.model)
        yield model.name, model
        return
    for name in NETWORKS:
        # Checked before any is measured.
        output_files(arguments, name)
    for name, build in NETWORKS.items():
        keras.utils.set_random_seed(arguments.seed)
        shape = (arguments.size, arguments.size, 3)
        model = build(input_shape=shape, include_top=False, weights=None)
        randomize_affine(model, arguments.stddev, arguments.seed)
        yield name, model


def main():
    arguments = parse_arguments()
    images = load_images(arguments.images, arguments.size, arguments.count, arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, model in make_networks(arguments):
        files = output_files(arguments, name)
        # EfficientNets scale their inputs themselves; the others expect values from -1 to 1.
        scaled = images if name.startswith("EfficientNet") or arguments.model is not None else images / 127.5 - 1
        results = measure(name, model, scaled)
        write_csv(files[0], results)
        plot(files[1], name, results)
    print(f"\nFiles in {arguments.output}")


if __name__ == "__main__":
    main()
