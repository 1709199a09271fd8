"""Measures how far proxies are from the data at the end of a training, next to the accuracy.

    python3 -m pip install -e ".[examples]"
    python3 benchmarks/proxy_distance.py  # half an hour on two cores; stopped and called again, it goes on

Networks are trained as by `accuracy.py`, with one learning rate for all. On the images that are held out, what
`keras_proxynorm.diagnostics.collapse_report` measures of each layer is then read: how far the means of the channels of
the normalized pre-activation are from those of the proxy, root mean square over the channels, in standard deviations of
the proxy, and by what factor their standard deviations differ, the median over the channels. Of these the columns are
the median over the layers and the largest.
"""

import argparse
import functools
from pathlib import Path
from typing import NamedTuple

import accuracy
from rate_search import add_arguments
from rate_search import check_positive
from rate_search import work

RESULTS = accuracy.RESULTS.with_name("proxy_distance.csv")
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
    """Trains, tests, and looks at the proxies."""
    import numpy as np

    from keras_proxynorm.diagnostics import collapse_report

    model, result = accuracy.trained_model(folder, run)
    sizes = accuracy.Sizes(*(getattr(run.configuration, name) for name in accuracy.Sizes._fields))
    _, images, _ = accuracy.load_data(run.configuration.dataset, sizes, folder)
    report = collapse_report(model, images, batch_size=accuracy.TEST_BATCH_SIZE, verbose=0)
    columns = (report.mean_distance, report.stddev_ratio)
    values = [float(summary(column)) for column in columns for summary in (np.nanmedian, np.nanmax)]
    return Result(*values, *result)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=accuracy.NETWORKS, default="plain15", help="default: plain15")
    names = " ".join(NORMALIZATIONS)
    parser.add_argument("--normalizations", nargs="+", default=NORMALIZATIONS, metavar="NAME", help=f"default: {names}")
    numbers = " ".join(map(str, BATCH_SIZES))
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=BATCH_SIZES, metavar="N", help=f"default: {numbers}"
    )
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with the four IDX files")
    add_arguments(parser, RESULTS)
    arguments = parser.parse_args()
    arguments.rate = arguments.rate or RATE
    check_positive(parser, arguments, "batch_sizes", "jobs", "minutes")
    accuracy.check_normalizations(parser, arguments)
    arguments.fashion_mnist = accuracy.checked_fashion_mnist(parser, arguments.fashion_mnist)
    return arguments


def main():
    """Runs what the file has not."""
    arguments = parse_arguments()
    configurations = [
        accuracy.Configuration(
            "fashion_mnist", arguments.network, normalization, batch_size, *accuracy.DATASETS["fashion_mnist"]
        )
        for batch_size in arguments.batch_sizes
        for normalization in arguments.normalizations
    ]
    work(configurations, functools.partial(measure, arguments.fashion_mnist), arguments, Result)


if __name__ == "__main__":
    main()
