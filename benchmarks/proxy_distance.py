"""Measures how far proxies are from the data at the end of a training, next to the accuracy.

    python3 -m pip install -e ".[examples]"
    python3 benchmarks/proxy_distance.py  # half an hour on two cores; stopped and called again, it resumes

Networks are trained as by `accuracy.py`, with one learning rate for all. `keras_proxynorm.diagnostics.collapse_report`
then measures each layer on the held-out images: how far the channel means of the normalized pre-activation are from
those of the proxy, root mean square over the channels, in standard deviations of the proxy; and by what factor their
standard deviations differ, the median over the channels. The columns are the median over the layers, and the largest.
"""

import argparse
import functools
from pathlib import Path
from typing import NamedTuple

import accuracy
import classifiers
import grids
import numpy as np

from keras_proxynorm.diagnostics import collapse_report

RESULTS = grids.RESULTS / "proxy_distance.csv"
NORMALIZATIONS = ("group_norm_proxy", "layer_norm_proxy", "layer_norm_proxy:calibrate_proxies=8")
BATCH_SIZES = (64, 8)
RATE = 0.03


class Result(NamedTuple):
    """What a run found. Accuracies are fractions."""

    mean_distance: float
    largest_mean_distance: float
    stddev_ratio: float
    largest_stddev_ratio: float
    held_out_accuracy: float
    held_out_loss: float
    test_accuracy: float
    test_loss: float
    seconds: float
    versions: str


def measure(folder, run):
    """Trains, tests, and measures the proxies."""
    model, result = accuracy.trained_model(folder, run)
    images = accuracy.load_data(run.configuration.dataset, run.configuration.sizes, folder).held_out.images
    report = collapse_report(model, images, batch_size=classifiers.TEST_BATCH_SIZE, verbose=0)
    columns = (report.mean_distance, report.stddev_ratio)
    values = [float(summary(column)) for column in columns for summary in (np.nanmedian, np.nanmax)]
    return Result(*values, *result)


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=accuracy.NETWORKS, default="plain15", help="default: plain15")
    grids.add_list(parser, "normalizations", NORMALIZATIONS)
    grids.add_list(parser, "batch-sizes", BATCH_SIZES, int)
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with the four IDX files")
    grids.add_arguments(parser, RESULTS, rate=RATE)
    arguments = parser.parse_args()
    grids.check_positive(parser, arguments, "batch_sizes")
    accuracy.check_normalizations(parser, arguments)
    arguments.fashion_mnist = classifiers.check_fashion_mnist(parser, arguments.fashion_mnist)
    return arguments


def main():
    """Does the runs that the file does not have."""
    arguments = parse_arguments()
    configurations = [
        accuracy.Configuration(
            "fashion_mnist", arguments.network, normalization, batch_size, *accuracy.DATASETS["fashion_mnist"]
        )
        for batch_size in arguments.batch_sizes
        for normalization in arguments.normalizations
    ]
    grids.work(configurations, functools.partial(measure, arguments.fashion_mnist), arguments, Result)


if __name__ == "__main__":
    main()
