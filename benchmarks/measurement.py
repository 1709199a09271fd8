"""What the benchmarks of speed share: contenders in turns, a process for each setting, tables and CSV files."""

import csv
import importlib.metadata
import math
import multiprocessing
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

__all__ = [
    "geometric_mean",
    "in_own_process",
    "medians_in_turns",
    "read_rows",
    "results_file",
    "set_threads",
    "write_results",
]


def medians_in_turns(contenders, repeats, warm_up=3):
    """Median seconds of each of several functions, called in turns so that a noisy machine is noisy for all.

    Each turn has its own order, because the preceding function determines the state of caches and memory.

    Args:
        contenders: Dict of functions without arguments.
        repeats: How many turns are measured.
        warm_up: How many turns go before: tracing, compilation, caches.

    Returns:
        A dict with the median of each, in seconds.
    """
    import tensorflow as tf

    times = {name: [] for name in contenders}
    order = random.Random(0)
    for turn in range(-warm_up, repeats):
        for name in order.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            tf.test.experimental.sync_devices()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def in_own_process(function, *arguments):
    """Calls a function of a module in a fresh process: the number of threads, and peak memory, belong to a process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def set_threads(threads):
    """Sets how many threads TensorFlow computes with; before it computes anything."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def device_name():
    """The name of the first GPU, or "cpu"."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return "cpu"
    return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "gpu").lower().replace(" ", "_")


def results_file(benchmark, *conditions):
    """Where the results go; what they depend on is in its name."""
    versions = [f"{name}{importlib.metadata.version(name)}" for name in ("tensorflow", "keras")]
    name = "-".join([benchmark, in_own_process(device_name), *conditions, *versions])
    return Path(__file__).with_name("results") / f"{name}.csv"


def read_rows(path):
    """The rows of a CSV file, as dicts."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_results(path, rows, keys=()):
    """Writes dicts with the same keys as CSV; a file of the same name has the same conditions.

    Args:
        path: The file. It is replaced, except for its rows about something else:
        keys: The names of the columns that say what a row is about.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {tuple(str(row[key]) for key in keys) for row in rows}
    others = []
    if keys and path.exists():
        others = [row for row in read_rows(path) if tuple(row[key] for key in keys) not in measured]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*others, *rows], key=lambda row: [str(row[key]).zfill(9) for key in keys]))


def geometric_mean(values):
    """The mean for ratios."""
    return math.exp(statistics.fmean(map(math.log, values)))
