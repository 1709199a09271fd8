"""Grids of trainings that resume from a CSV file: what to run next, in which process, and the file.

A configuration is a named tuple of what is measured; a run adds a learning rate and a seed. The first seed searches the
learning rate: those of `FIRST_RATES` are tried, then the neighbours of the best, until both are worse. With that rate,
the configuration is trained from the other seeds. Held-out accuracy decides; test accuracy does not.

Each run that is done is a line of the file, at once, and is never done again.
"""

import concurrent.futures
import csv
import math
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from measurement import read_rows

__all__ = [
    "RESULTS",
    "ROOT",
    "SEEDS",
    "Result",
    "Run",
    "add_arguments",
    "check_positive",
    "chosen_runs",
    "read_results",
    "tried_rates",
    "work",
]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# For batches of 64, and in proportion for others.
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
FIRST_RATES = (0.03, 0.1, 0.3)
SEEDS = (0, 1, 2)
# TensorFlow keeps some memory of each run, so a process ends after so many.
RUNS_OF_A_WORKER = 25


class Run(NamedTuple):
    """One training."""

    configuration: NamedTuple
    learning_rate: float
    seed: int


class Result(NamedTuple):
    """What a run found. Accuracies are fractions."""

    held_out_accuracy: float
    held_out_loss: float
    test_accuracy: float
    test_loss: float
    seconds: float
    versions: str


def columns(kind, result_kind=Result):
    """The columns of a file of configurations and results of these classes."""
    return (*kind._fields, *Run._fields[1:], *result_kind._fields)


def read_results(path, kind, result_kind=Result):
    """Reads the runs in a CSV file, of configurations of the class `kind`, and their results."""
    if not path.exists():
        return {}
    results = {}
    for number, row in enumerate(read_rows(path), 2):
        if set(row) != set(columns(kind, result_kind)) or None in row.values():
            sys.exit(f"Line {number} of {path} is not of this script. Delete it to go on, or give another --output.")
        values = {name: _as_written(text) for name, text in row.items()}
        configuration = kind(*(values[name] for name in kind._fields))
        run = Run(configuration, values["learning_rate"], values["seed"])
        results[run] = result_kind(*(values[name] for name in result_kind._fields))
    return results


def _as_written(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def append_result(path, run, result):
    """Appends a line in the order of the columns that the file has; a new file begins with a header."""
    if path.exists():
        with path.open(newline="") as file:
            header = next(csv.reader(file))
    else:
        header = columns(type(run.configuration), type(result))
        path.parent.mkdir(parents=True, exist_ok=True)
        _append_line(path, header)
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in result._asdict().items()}
    values = {**run._asdict(), **run.configuration._asdict(), **rounded}
    _append_line(path, [values[name] for name in header])


def _append_line(path, values):
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(values)


def best_rate(tried):
    """The learning rate with the best held-out accuracy; of equals that with the lower loss."""

    def merit(rate):
        loss = tried[rate].held_out_loss
        return tried[rate].held_out_accuracy, -math.inf if math.isnan(loss) else -loss

    return max(tried, key=merit)


def tried_rates(configuration, seed, results):
    """Results of a seed, by learning rate."""
    runs = ((rate, Run(configuration, rate, seed)) for rate in LEARNING_RATES)
    return {rate: results[run] for rate, run in runs if run in results}


def rates_to_try(configuration, seed, results):
    """The learning rates that can be tried now; none if one is chosen."""
    tried = tried_rates(configuration, seed, results)
    first = [rate for rate in FIRST_RATES if rate not in tried]
    if first:
        return first
    best = LEARNING_RATES.index(best_rate(tried))
    return [rate for rate in LEARNING_RATES[max(0, best - 1) : best + 2] if rate not in tried]


def next_runs(configuration, seeds, results, rate=None):
    """The runs of a configuration that can be done now; none if it is done. With a `rate`, all have that one."""
    if rate is not None:
        return [run for seed in seeds if (run := Run(configuration, rate, seed)) not in results]
    first, *others = seeds
    rates = rates_to_try(configuration, first, results)
    if rates:
        return [Run(configuration, rate, first) for rate in rates]
    rate = best_rate(tried_rates(configuration, first, results))
    return [run for seed in others if (run := Run(configuration, rate, seed)) not in results]


def chosen_runs(configuration, seeds, results):
    """The runs so far of a configuration with the learning rate that was chosen; none if it is not chosen yet."""
    if rates_to_try(configuration, seeds[0], results):
        return []
    rate = best_rate(tried_rates(configuration, seeds[0], results))
    return [run for seed in seeds if (run := Run(configuration, rate, seed)) in results]


def count_missing(configuration, seeds, results, rate=None):
    """Counts the missing runs of a configuration, without rates that the search may try later."""
    searching = rate is None and rates_to_try(configuration, seeds[0], results)
    return len(next_runs(configuration, seeds, results, rate)) + (len(seeds) - 1 if searching else 0)


def remaining_seconds(counts, results):
    """Estimates how long one process takes for missing runs, counted by configuration, from those that are done."""
    seconds = {}
    for run, result in results.items():
        for key in _comparable(run.configuration):
            seconds.setdefault(key, []).append(result.seconds)
    left = 0.0
    for configuration, count in counts.items():
        known = next(seconds[key] for key in _comparable(configuration) if key in seconds)
        left += count * statistics.fmean(known)
    return left


def _comparable(configuration):
    # What takes about as long: the same with another normalization, or else with that batch size, or else anything.
    return configuration._replace(normalization=None), configuration.batch_size, None


def describe(run, result):
    """What was run and found, in a line."""
    fields = run.configuration._asdict().items()
    names = [str(value) for name, value in fields if not name.endswith("images") and value != ""]
    found = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in result._asdict().items() if "accuracy" in name]
    return f"{' '.join(names)}, rate {run.learning_rate:g}, seed {run.seed}: {', '.join(found)}, {result.seconds:.0f} s"


def start_worker():
    """Sets one thread for each process, which wastes less than two threads for one, above all with small batches."""
    import tensorflow as tf

    # It warns of graphs that are traced again and again; here each configuration has its own.
    tf.get_logger().setLevel("ERROR")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def start_pools(jobs):
    """Starts a pool for each process, so that a configuration can stay in one, which builds its graph once."""
    context = multiprocessing.get_context("spawn")
    return [
        concurrent.futures.ProcessPoolExecutor(
            1, mp_context=context, initializer=start_worker, max_tasks_per_child=RUNS_OF_A_WORKER
        )
        for _ in range(jobs)
    ]


def work(configurations, measure, arguments, result_kind=Result, rate_of=None):
    """Does the missing runs, in each process one configuration after the other, until the time is up.

    Args:
        configurations: Of one class, with the fields `batch_size` and `normalization`.
        measure: A function of a module that makes a result of a `Run`; called in other processes.
        arguments: With those of `add_arguments`.
        result_kind: The class of the results, with the field `seconds`, and those of `Result` that choose a rate.
        rate_of: A function from a configuration to its learning rate, None to search it; by default `--rate` is for
            all.
    """
    rate_of = rate_of or (lambda configuration: arguments.rate)
    results = read_results(arguments.output, type(configurations[0]), result_kind)
    deadline = time.monotonic() + 60 * arguments.minutes
    waiting = iter(configurations)
    current, running = {}, {}

    def missing(configuration):
        return next_runs(configuration, arguments.seeds, results, rate_of(configuration))

    def start_next(pool):
        while pool not in current or not missing(current[pool]):
            if (configuration := next(waiting, None)) is None:
                return
            current[pool] = configuration
        if time.monotonic() < deadline:
            run = missing(current[pool])[0]
            running[pool.submit(measure, run)] = pool, run

    pools = start_pools(arguments.jobs)
    try:
        for pool in pools:
            start_next(pool)
        while running:
            finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                pool, run = running.pop(future)
                results[run] = result = future.result()
                append_result(arguments.output, run, result)
                counts = {each: count_missing(each, arguments.seeds, results, rate_of(each)) for each in configurations}
                minutes = math.ceil(remaining_seconds(counts, results) / arguments.jobs / 60)
                print(f"{describe(run, result)} (about {minutes} min to go)", flush=True)
                start_next(pool)
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
    undone = sum(1 for configuration in configurations if missing(configuration))
    if undone:
        print(f"{undone} of {len(configurations)} configurations are not done. Run it again to go on.")
    else:
        print(f"All of {len(configurations)} configurations are done: {arguments.output}")


def add_arguments(parser, output, seeds=SEEDS, rate=None):
    """Adds what `work` takes to a parser of the command line; with a `rate`, that is the default."""
    add_list(parser, "seeds", seeds, int)
    rates, default = " ".join(map(str, LEARNING_RATES)), "the best is searched" if rate is None else rate
    parser.add_argument(
        "--rate",
        type=float,
        choices=LEARNING_RATES,
        default=rate,
        metavar="RATE",
        help=f"of {rates}; default: {default}",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="at a time; default: all cores")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which nothing more is started")
    parser.add_argument("--output", type=Path, default=output, metavar="CSV", help=f"default: {output.name}")


def add_list(parser, name, default, kind=str, choices=None):
    """Adds an argument of several values to a parser of the command line."""
    parser.add_argument(
        f"--{name}",
        nargs="+",
        type=kind,
        choices=choices,
        default=default,
        metavar="N" if kind is int else "NAME",
        help=f"default: {' '.join(map(str, default))}",
    )


def check_positive(parser, arguments, *names):
    """Ends the program if arguments, or entries of them, are given and not positive."""
    for name in (*names, "jobs", "minutes"):
        values = getattr(arguments, name)
        values = values if isinstance(values, (list, tuple)) else [values]
        if any(value is not None and value <= 0 for value in values):
            parser.error(f"--{name.replace('_', '-')} must be positive, not {' '.join(map(str, values))}")
    if min(arguments.seeds) < 0 or len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error(f"--seeds must be different numbers, not negative; not {' '.join(map(str, arguments.seeds))}")
