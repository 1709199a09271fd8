"""Runs of configurations with learning rates chosen on held-out data: what to run next, in which process, the CSV.

A configuration is a named tuple of what is measured. It is trained with `FIRST_RATES` from the first seed; that rate is
chosen with which the accuracy on held-out data is best, and while it is the largest or the smallest tried, the next one
is tried, too. With the chosen rate it is trained from the other seeds. Results of test data choose nothing.
"""

import concurrent.futures
import csv
import math
import multiprocessing
import os
import statistics
import sys
import time
from typing import NamedTuple

from measurement import read_rows

__all__ = ["FIRST_RATES", "LEARNING_RATES", "Result", "Run", "add_arguments", "check_positive", "chosen_runs", "work"]

# For batches of 64, and in proportion for others (Goyal et al., https://arxiv.org/abs/1706.02677).
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
FIRST_RATES = (0.03, 0.1, 0.3)
SEEDS = (0, 1, 2)
# Workers end after so many runs, because TensorFlow keeps some memory of each.
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
    """The columns of a file about configurations and results of these classes."""
    return (*kind._fields, *Run._fields[1:], *result_kind._fields)


def read_results(path, kind, result_kind=Result):
    """The runs of a CSV file, of configurations of the class `kind`, with their results."""
    if not path.exists():
        return {}
    results = {}
    for number, row in enumerate(read_rows(path), 2):
        if tuple(row) != columns(kind, result_kind) or None in row.values():
            sys.exit(f"Line {number} of {path} is not of this script. Delete it to go on, or give another --output.")
        values = {name: row[name] if name == "versions" else _as_written(row[name]) for name in row}
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
    """Writes a line, and a header first if the file is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(columns(type(run.configuration), type(result)))
        rounded = (round(value, 4) if isinstance(value, float) else value for value in result)
        writer.writerow([*run.configuration, *run[1:], *rounded])


def best_rate(tried):
    """The learning rate with the best accuracy on what is held out; of equals that with the lower loss."""

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
    """The runs of a configuration that can be done now; none if it is done. With a `rate` all have that one."""
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


def remaining_seconds(configurations, seeds, results, rate=None):
    """How long what is missing will take one process, as far as can be told: rates that are tried later are not."""
    seconds = {}
    for run, result in results.items():
        for key in (_size(run.configuration), run.configuration.batch_size, None):
            seconds.setdefault(key, []).append(result.seconds)
    left = 0.0
    for configuration in configurations:
        count = len(next_runs(configuration, seeds, results, rate))
        if rate is None and rates_to_try(configuration, seeds[0], results):
            count += len(seeds) - 1
        known = next(seconds[key] for key in (_size(configuration), configuration.batch_size, None) if key in seconds)
        left += count * statistics.fmean(known)
    return left


def _size(configuration):
    # With another normalization it takes nearly the same time.
    return configuration._replace(normalization=None)


def describe(run):
    """A run in a few words."""
    names = [str(value) for name, value in run.configuration._asdict().items() if not name.endswith("images")]
    return f"{' '.join(names)}, rate {run.learning_rate:g}, seed {run.seed}"


def start_worker():
    """One thread for each process, which wastes less than two threads for one, above all with small batches."""
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def start_pools(jobs):
    """A pool for each process, so that a configuration can stay in one, which builds its graph once."""
    context = multiprocessing.get_context("spawn")
    return [
        concurrent.futures.ProcessPoolExecutor(
            1, mp_context=context, initializer=start_worker, max_tasks_per_child=RUNS_OF_A_WORKER
        )
        for _ in range(jobs)
    ]


def work(configurations, measure, arguments, result_kind=Result):
    """Does the runs that are missing, in each process those of one configuration after the other, until it is time.

    Args:
        configurations: Of one class, which has the field `batch_size`, and `normalization`.
        measure: A function of a module that makes a result of a `Run`; called in other processes.
        arguments: With those of `add_arguments`.
        result_kind: The class of the results, which has the fields of `Result` that choose a rate, and `seconds`.
    """
    results = read_results(arguments.output, type(configurations[0]), result_kind)
    deadline = time.monotonic() + 60 * arguments.minutes
    waiting = iter(configurations)
    current, running = {}, {}

    def missing(configuration):
        return next_runs(configuration, arguments.seeds, results, arguments.rate)

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
                seconds = remaining_seconds(configurations, arguments.seeds, results, arguments.rate)
                print(
                    f"{describe(run)}: held out {result.held_out_accuracy:.3f}, test {result.test_accuracy:.3f} "
                    f"({result.seconds:.0f} s; about {math.ceil(seconds / arguments.jobs / 60)} min to go)",
                    flush=True,
                )
                start_next(pool)
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
    undone = sum(1 for configuration in configurations if missing(configuration))
    if undone:
        print(f"{undone} of {len(configurations)} configurations are not done. Run it again to go on.")
    else:
        print(f"All of {len(configurations)} configurations are done: {arguments.output}")


def add_arguments(parser, output):
    """Adds what `work` takes to a parser of the command line."""
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help=f"default: {' '.join(map(str, SEEDS))}"
    )
    rates = " ".join(map(str, LEARNING_RATES))
    parser.add_argument(
        "--rate", type=float, choices=LEARNING_RATES, metavar="RATE", help=f"of {rates}; default: the best is searched"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="at a time; default: all cores")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which nothing more is started")
    parser.add_argument("--output", type=type(output), default=output, metavar="CSV", help=f"default: {output.name}")


def check_positive(parser, arguments, *names):
    """Ends the program if arguments, or entries of them, that were given are not positive."""
    for name in names:
        values = getattr(arguments, name)
        values = values if isinstance(values, (list, tuple)) else [values]
        if any(value is not None and value <= 0 for value in values):
            parser.error(f"--{name.replace('_', '-')} must be positive, not {' '.join(map(str, values))}")
    if min(arguments.seeds) < 0 or len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error(f"--seeds must be different numbers, not negative; not {' '.join(map(str, arguments.seeds))}")
