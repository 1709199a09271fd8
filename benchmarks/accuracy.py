"""Measures what accuracy networks reach with batch norm, with group and layer norm with and without PN, and with none.

    python3 -m pip install -e ".[examples]"
    python3 benchmarks/accuracy.py                              # all of it: some hours on two cores
    python3 benchmarks/accuracy.py --minutes 90                 # a part of it; the next call goes on
    python3 benchmarks/accuracy.py --datasets digits            # half an hour, and needs no files
    python3 benchmarks/accuracy.py --networks plain15 --normalizations batch_norm "group_norm_proxy:proxy_epsilon=0.1"

A configuration is a dataset, a network, a normalization and a batch size. It is trained with several learning rates, on
one part of the training data; of these the one is chosen with which the accuracy on another part, held out, is best.
If that is the largest or the smallest, the next one is tried, too. With the chosen rate it is trained from further
seeds, of weights and of the order of the images. Test images choose nothing.

Each run that is done is a line in the CSV file, at once, and is never done again; runs with other numbers of images or
passes may be in the same file. `accuracy_report.py` makes tables and plots from it.

The normalizations are "batch_norm", "none" (with biases in its place) and what `keras_proxynorm.replace_normalization`
takes, with further arguments of that behind a colon if you like, as in the last line above.

Nothing is downloaded: Fashion-MNIST is read from --fashion-mnist FOLDER, from Debian's package dataset-fashion-mnist,
or from where Keras keeps what it has downloaded; the digits are part of scikit-learn.
"""

import argparse
import ast
import concurrent.futures
import csv
import functools
import math
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # what examples/compare.py has: images and their order, the optimizer

RESULTS = ROOT / "benchmarks" / "results" / "accuracy.csv"
NETWORKS = ("plain15", "resnet20", "plain30", "efficientnet")
DEFAULT_NETWORKS = {"fashion_mnist": NETWORKS, "digits": NETWORKS[:1]}
NORMALIZATIONS = ("batch_norm", "group_norm_proxy", "layer_norm_proxy", "group_norm", "layer_norm", "none")
BATCH_SIZES = (64, 8, 2)
SEEDS = (0, 1, 2)
# For batches of 64, and in proportion for others (Goyal et al., https://arxiv.org/abs/1706.02677). First those in the
# middle, then further in the direction that is better.
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FIRST_RATES = (0.03, 0.1, 0.3)
# A group of the first stage, of 16 channels, then has two.
GROUPS = {"groups": 8, "min_channels_per_group": 2}
TEST_BATCH_SIZE = 250
# Workers end after so many runs, because TensorFlow keeps some memory of each.
RUNS_OF_A_WORKER = 25


class Sizes(NamedTuple):
    """Numbers of images, and of passes over those to train with."""

    train_images: int
    held_out_images: int
    test_images: int
    epochs: int


DATASETS = {"fashion_mnist": Sizes(5000, 2000, 4000, 3), "digits": Sizes(1200, 200, 397, 10)}


class Configuration(NamedTuple):
    """What a learning rate is chosen for."""

    dataset: str
    network: str
    normalization: str
    batch_size: int
    train_images: int
    held_out_images: int
    test_images: int
    epochs: int


class Run(NamedTuple):
    """One training. `learning_rate` is for batches of 64."""

    configuration: Configuration
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


COLUMNS = (*Configuration._fields, *Run._fields[1:], *Result._fields)


def read_results(path):
    """The runs of a CSV file with their results."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    results = {}
    for number, row in enumerate(rows, 2):
        if set(row) != set(COLUMNS) or None in row.values():
            sys.exit(
                f"Line {number} of {path} is not one of this script. Delete it to go on, or give another --output."
            )
        values = {name: as_written(row[name]) if name != "versions" else row[name] for name in COLUMNS}
        configuration = Configuration(*(values[name] for name in Configuration._fields))
        run = Run(configuration, values["learning_rate"], values["seed"])
        results[run] = Result(*(values[name] for name in Result._fields))
    return results


def as_written(text):
    """The number that a text is, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def append_result(path, run, result):
    """Writes a line, and a header first if the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        numbers = [f"{value:.4f}" for value in result[:4]]
        writer.writerow([*run.configuration, *run[1:], *numbers, f"{result.seconds:.1f}", result.versions])


def best_rate(results):
    """The learning rate with the best accuracy on what is held out; of equals that with the lower loss."""

    def merit(rate):
        loss = results[rate].held_out_loss
        return results[rate].held_out_accuracy, -math.inf if math.isnan(loss) else -loss

    return max(results, key=merit)


def chosen_rate(configuration, seed, results):
    """The learning rate that was chosen, and None while runs for that are missing."""
    return None if _rates_to_try(configuration, seed, results) else best_rate(_tried(configuration, seed, results))


def _tried(configuration, seed, results):
    runs = ((rate, Run(configuration, rate, seed)) for rate in LEARNING_RATES)
    return {rate: results[run] for rate, run in runs if run in results}


def _rates_to_try(configuration, seed, results):
    tried = _tried(configuration, seed, results)
    first = [rate for rate in FIRST_RATES if rate not in tried]
    if first:
        return first
    best = LEARNING_RATES.index(best_rate(tried))
    neighbours = LEARNING_RATES[max(0, best - 1) : best + 2]
    return [rate for rate in neighbours if rate not in tried]


def next_runs(configuration, seeds, results):
    """The runs of a configuration that can be done now; none if it is done."""
    first, *others = seeds
    rates = _rates_to_try(configuration, first, results)
    if rates:
        return [Run(configuration, rate, first) for rate in rates]
    rate = chosen_rate(configuration, first, results)
    return [run for seed in others if (run := Run(configuration, rate, seed)) not in results]


def parse_normalization(text):
    """The name of a normalization and the further arguments behind its colon."""
    name, _, arguments = text.partition(":")
    call = ast.parse(f"f({arguments})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError(f"must be NAME or NAME:ARGUMENT=VALUE,..., not {text}")
    return name, {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def build_model(network, normalization, shape, classes):
    """A network with a normalization; with the same seed, the kernels are the same with each normalization."""
    from networks import NETWORKS as builders

    from keras_proxynorm import replace_normalization

    name, arguments = parse_normalization(normalization)
    model = builders[network](shape, classes, use_bias=name == "none")
    if name == "batch_norm":
        return model
    if name == "none":
        import compare

        return replace_normalization(model, compare.identity)
    return replace_normalization(model, name, **{**GROUPS, **arguments})


def find_fashion_mnist(folder=None):
    """The folder with the files of Fashion-MNIST; None if there is none."""
    import compare

    keras_home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    candidates = [compare.FASHION_MNIST, keras_home / "datasets" / "fashion-mnist"] if folder is None else [folder]
    complete = (path for path in candidates if all(compare.find_idx(path, name) for name in compare.IDX_FILES))
    return next(complete, None)


@functools.lru_cache(maxsize=2)
def load_data(dataset, sizes, folder):
    """What to train and test with, as `compare.Data`, and the images and the labels that are held out."""
    import compare
    import numpy as np
    from sklearn.model_selection import train_test_split

    if dataset == "fashion_mnist":
        _, *arrays = compare.load_fashion_mnist(folder, None, sizes.test_images)
    else:
        _, *arrays = compare.load_digit_images(sizes.train_images + sizes.held_out_images, sizes.test_images)
        arrays[::2] = (compare.resized(images, 16) for images in arrays[::2])
    images, labels, test_images, test_labels = arrays
    train, held_out = train_test_split(
        np.arange(len(images)),
        train_size=sizes.train_images,
        test_size=sizes.held_out_images,
        stratify=labels,
        random_state=0,
    )
    mean, stddev = images[train].mean(), images[train].std()

    def standardized(images):
        return ((images - mean) / stddev).astype("float32")

    labels, test_labels = labels.astype("int32"), test_labels.astype("int32")
    data = compare.Data(
        dataset,
        standardized(images[train]),
        labels[train],
        standardized(test_images),
        test_labels,
        int(labels.max()) + 1,
    )
    return data, standardized(images[held_out]), labels[held_out]


@functools.lru_cache(maxsize=1)
def compiled_model(configuration, shape, classes):
    """A model, and the variable that scales its learning rates: runs that differ in rate and seed share the graph."""
    import compare
    import keras

    keras.utils.clear_session()
    model = build_model(configuration.network, configuration.normalization, shape, classes)
    scale = keras.Variable(1.0, trainable=False, name="scale")
    schedule = keras.optimizers.schedules.LearningRateSchedule

    class Scaled(schedule):
        def __init__(self, schedule):
            self.schedule = schedule

        def __call__(self, step):
            return scale * self.schedule(step)

    steps = configuration.epochs * (configuration.train_images // configuration.batch_size)
    compare.compile_model(model, 1.0, steps)
    model.optimizer._learning_rate = Scaled(model.optimizer._learning_rate)
    return model, scale


def measure(run, folder):
    """Trains and tests."""
    import compare
    import keras

    configuration = run.configuration
    start = time.perf_counter()
    data, held_out_images, held_out_labels = load_data(configuration.dataset, Sizes(*configuration[4:]), folder)
    shape = data.train_images.shape[1:]
    model, scale = compiled_model(configuration, shape, data.classes)
    scale.assign(compare.learning_rate_for(configuration.batch_size, run.learning_rate))
    keras.utils.set_random_seed(run.seed)
    fresh = build_model(configuration.network, configuration.normalization, shape, data.classes)
    model.set_weights(fresh.get_weights())
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))
    order = compare.draw_order(len(data.train_images), configuration.batch_size, configuration.epochs, run.seed)
    # It also waits for each call, without which some machines sleep for longer than the call takes.
    stop = keras.callbacks.TerminateOnNaN()
    model.fit(compare.make_batches(data, order), shuffle=False, verbose=0, callbacks=[stop])
    held_out = model.evaluate(held_out_images, held_out_labels, batch_size=TEST_BATCH_SIZE, verbose=0)
    test = model.evaluate(data.test_images, data.test_labels, batch_size=TEST_BATCH_SIZE, verbose=0)
    seconds = time.perf_counter() - start
    return Result(held_out[1], held_out[0], test[1], test[0], seconds, compare.describe_versions())


def start_worker():
    """One thread for each process, which wastes less than two threads for one, above all with small batches."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def remaining_seconds(configurations, seeds, results):
    """How long what is missing will take one process, as far as can be told: rates that are tried later are not."""
    seconds = {}
    for run, result in results.items():
        for key in (run.configuration[:2] + run.configuration[3:], run.configuration.batch_size, None):
            seconds.setdefault(key, []).append(result.seconds)
    left = 0.0
    for configuration in configurations:
        runs = next_runs(configuration, seeds, results)
        count = len(runs)
        if runs and _rates_to_try(configuration, seeds[0], results):
            count += len(seeds) - 1
        keys = (configuration[:2] + configuration[3:], configuration.batch_size, None)
        known = next((seconds[key] for key in keys if key in seconds), [math.nan])
        left += count * statistics.fmean(known) if count else 0.0
    return left


def describe(run):
    """A run in a few words."""
    configuration = run.configuration
    return (
        f"{configuration.dataset} {configuration.network} {configuration.normalization} batch size "
        f"{configuration.batch_size} rate {run.learning_rate:g} seed {run.seed}"
    )


def start_pools(jobs):
    """A pool for each process, so that a configuration can stay in one, which builds its graph once."""
    context = multiprocessing.get_context("spawn")
    return [
        concurrent.futures.ProcessPoolExecutor(
            1, mp_context=context, initializer=start_worker, max_tasks_per_child=RUNS_OF_A_WORKER
        )
        for _ in range(jobs)
    ]


def work(configurations, arguments):
    """Does the runs that are missing, in each process those of one configuration after the other, until it is time."""
    results = read_results(arguments.output)
    deadline = time.monotonic() + 60 * arguments.minutes
    waiting = iter(configurations)
    current, running = {}, {}

    def start_next(pool):
        while pool not in current or not next_runs(current[pool], arguments.seeds, results):
            if (configuration := next(waiting, None)) is None:
                return
            current[pool] = configuration
        if time.monotonic() < deadline:
            run = next_runs(current[pool], arguments.seeds, results)[0]
            running[pool.submit(measure, run, arguments.fashion_mnist)] = pool, run

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
                minutes = remaining_seconds(configurations, arguments.seeds, results) / arguments.jobs / 60
                print(
                    f"{describe(run)}: held out {result.held_out_accuracy:.3f}, test {result.test_accuracy:.3f} "
                    f"({result.seconds:.0f} s; about {math.ceil(minutes)} min to go)",
                    flush=True,
                )
                start_next(pool)
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
    missing = sum(1 for configuration in configurations if next_runs(configuration, arguments.seeds, results))
    if missing:
        print(f"{missing} of {len(configurations)} configurations are not done. Run it again to go on.")
    else:
        print(f"All of {len(configurations)} configurations are done: {arguments.output}")


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = " ".join(DATASETS)
    parser.add_argument(
        "--datasets", nargs="+", choices=DATASETS, default=list(DATASETS), metavar="NAME", help=f"default: {names}"
    )
    names = "; ".join(f"{' '.join(networks)} with {dataset}" for dataset, networks in DEFAULT_NETWORKS.items())
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, metavar="NAME", help=f"default: {names}")
    parser.add_argument(
        "--normalizations",
        nargs="+",
        default=NORMALIZATIONS,
        metavar="NAME",
        help=f"default: {' '.join(NORMALIZATIONS)}",
    )
    for name, values in (("batch-sizes", BATCH_SIZES), ("seeds", SEEDS)):
        parser.add_argument(
            f"--{name}", nargs="+", type=int, default=values, metavar="N", help=f"default: {' '.join(map(str, values))}"
        )
    for name in ("train-images", "held-out-images", "epochs"):
        numbers = ", ".join(
            f"{getattr(sizes, name.replace('-', '_'))} with {dataset}" for dataset, sizes in DATASETS.items()
        )
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"default: {numbers}")
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with the four IDX files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="at a time; default: all cores")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which nothing more is started")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="CSV", help=f"default: {RESULTS.name}")
    arguments = parser.parse_args()
    for name in ("batch_sizes", "train_images", "held_out_images", "epochs", "jobs", "minutes"):
        values = getattr(arguments, name)
        values = values if isinstance(values, (list, tuple)) else [values]
        if any(value is not None and value <= 0 for value in values):
            parser.error(f"--{name.replace('_', '-')} must be positive, not {values}")
    if min(arguments.seeds) < 0:
        parser.error(f"--seeds must not be negative, not {arguments.seeds}")
    check_normalizations(parser, arguments)
    if "fashion_mnist" in arguments.datasets:
        folder = find_fashion_mnist(arguments.fashion_mnist)
        if folder is None:
            parser.error(
                f"{arguments.fashion_mnist or 'no folder'} has the four files of Fashion-MNIST. Install Debian's "
                "package dataset-fashion-mnist, give --fashion-mnist FOLDER, or take --datasets digits"
            )
        arguments.fashion_mnist = folder
    return arguments


def check_normalizations(parser, arguments):
    """Names and their arguments, before hours pass until they are needed."""
    from keras_proxynorm.surgery.targets import TARGETS

    for text in arguments.normalizations:
        try:
            name, _ = parse_normalization(text)
            if name not in ("batch_norm", "none", *TARGETS):
                raise ValueError(f"must be of {', '.join(('batch_norm', 'none', *TARGETS))}, not {name}")
            build_model("plain15", text, (16, 16, 1), 2)
        except (ValueError, SyntaxError) as error:
            parser.error(f"--normalizations: {error}")


def make_configurations(arguments):
    """What is to be done, in the order in which it is."""
    configurations = []
    for dataset in arguments.datasets:
        sizes = DATASETS[dataset]._asdict()
        given = {name: getattr(arguments, name, None) for name in sizes}
        sizes.update({name: value for name, value in given.items() if value is not None})
        configurations += [
            Configuration(dataset, network, normalization, batch_size, **sizes)
            for network in arguments.networks or DEFAULT_NETWORKS[dataset]
            for batch_size in arguments.batch_sizes
            for normalization in arguments.normalizations
        ]
    return configurations


def main():
    """Runs what the file has not."""
    arguments = parse_arguments()
    configurations = make_configurations(arguments)
    print(f"{len(configurations)} configurations, from {len(arguments.seeds)} seeds each, into {arguments.output}")
    work(configurations, arguments)


if __name__ == "__main__":
    main()
