"""Writes the tables of docs/accuracy.md and the plots in docs/accuracy/ from the results.

    python3 -m pip install -e ".[examples,plots]"
    python3 benchmarks/accuracy_report.py

takes seconds. It reads what `accuracy.py`, `finetuning.py`, `proxy_distance.py` and `replaced_accuracy.py` write to
results/, and replaces the text between `<!-- table NAME -->` and `<!-- end -->`. Mean and sample standard deviation are
over the runs with the chosen learning rate; the number of runs follows in parentheses.
"""

import re
import statistics

import accuracy
import finetuning
import proxy_distance
import replaced_accuracy
from grids import ROOT, SEEDS, chosen_runs, read_results, tried_rates
from measurement import read_rows

PAGE = ROOT / "docs" / "accuracy.md"
PLOTS = ROOT / "docs" / "accuracy"
# A rate for all, at which the study also compares, because rates chosen with one seed are noisy.
STUDY_RATE = 0.03
LABELS = {
    "batch_norm": "BN",
    "group_norm_proxy": "GN+PN",
    "layer_norm_proxy": "LN+PN",
    "group_norm": "GN",
    "layer_norm": "LN",
    "none": "none",
}
NETWORK_LABELS = {
    "plain15": "plain, 15 layers",
    "plain30": "plain, 30 layers",
    "resnet20": "ResNet v2, 20 layers",
    "efficientnet": "EfficientNet-style",
}
WAY_LABELS = {"copied": "as it is", "compensate": "`compensate=True`", "calibrate": "`calibrate=images`"}


def label(normalization):
    """The name of a normalization in tables."""
    name, _, arguments = normalization.partition(":")
    return f"{LABELS.get(name, name)}, `{arguments.replace(',', ', ')}`" if arguments else LABELS.get(name, name)


def accuracies(configuration, results):
    """The test accuracies in percent with the chosen learning rate; none if it is not chosen yet."""
    return [100 * results[run].test_accuracy for run in chosen_runs(configuration, SEEDS, results)]


def chosen_rate(configuration, results):
    """The chosen learning rate, as text."""
    runs = chosen_runs(configuration, SEEDS, results)
    return f"{runs[0].learning_rate:g}" if runs else "-"


def accuracies_at(configuration, rate, results):
    """The test accuracies in percent with a given learning rate; none if seeds are missing."""
    values = [100 * result.test_accuracy for run, result in results.items() if run[:2] == (configuration, rate)]
    return values if len(values) >= len(SEEDS) else []


def stddev(values):
    """The sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def entry(values):
    """Mean, standard deviation and number of accuracies, as text."""
    if not values:
        return "-"
    deviation = f" ± {stddev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation} ({len(values)})"


def table(header, rows):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main_configurations(dataset):
    """The configurations in the table of a dataset, by network, normalization and batch size."""
    sizes = accuracy.DATASETS[dataset]
    return {
        (network, normalization, batch_size): accuracy.Configuration(
            dataset, network, normalization, batch_size, *sizes
        )
        for network in accuracy.DEFAULT_NETWORKS[dataset]
        for normalization in accuracy.NORMALIZATIONS
        for batch_size in accuracy.BATCH_SIZES
    }


def accuracy_table(dataset, results):
    """Test accuracy in percent, by network and normalization, and batch size."""
    configurations = main_configurations(dataset)
    batch_sizes = sorted(accuracy.BATCH_SIZES)
    rows = [
        [
            NETWORK_LABELS[network],
            LABELS[normalization],
            *(entry(accuracies(configurations[network, normalization, size], results)) for size in batch_sizes),
        ]
        for network in accuracy.DEFAULT_NETWORKS[dataset]
        for normalization in accuracy.NORMALIZATIONS
    ]
    return table(["network", "normalization", *(f"batch size {size}" for size in batch_sizes)], rows)


def rates_table(results):
    """The chosen learning rates, for batches of 64, and how many were tried."""
    batch_sizes = sorted(accuracy.BATCH_SIZES)

    def rate(configuration):
        count = len(tried_rates(configuration, SEEDS[0], results))
        return f"{chosen_rate(configuration, results)} of {count}"

    rows = []
    for dataset in accuracy.DATASETS:
        configurations = main_configurations(dataset)
        for network in accuracy.DEFAULT_NETWORKS[dataset]:
            for normalization in accuracy.NORMALIZATIONS:
                rates = [rate(configurations[network, normalization, size]) for size in batch_sizes]
                rows.append([dataset, NETWORK_LABELS[network], LABELS[normalization], *rates])
    header = ["dataset", "network", "normalization", *(f"batch size {size}" for size in batch_sizes)]
    return table(header, rows)


def study_table(results):
    """Test accuracy with other arguments of a normalization and other numbers of images."""
    main = {configuration for dataset in accuracy.DATASETS for configuration in main_configurations(dataset).values()}
    others = {run.configuration for run in results} - main
    # What each is compared with.
    base = {
        other._replace(normalization=normalization)
        for other in others
        for normalization in (other.normalization.partition(":")[0], "batch_norm")
    }
    order = {network: i for i, network in enumerate(accuracy.NETWORKS)}
    shown = sorted(
        others | base,
        key=lambda c: (order[c.network], c.train_images, c.batch_size, c.normalization.partition(":")[0], c),
    )
    rows = [
        [
            NETWORK_LABELS[configuration.network],
            str(configuration.train_images),
            str(configuration.batch_size),
            label(configuration.normalization),
            entry(accuracies(configuration, results)),
            chosen_rate(configuration, results),
            entry(accuracies_at(configuration, STUDY_RATE, results)),
        ]
        for configuration in shown
        if accuracies(configuration, results) or accuracies_at(configuration, STUDY_RATE, results)
    ]
    header = ["network", "images", "batch size", "normalization", "test accuracy", "learning rate"]
    return table([*header, f"test accuracy with {STUDY_RATE:g}"], rows)


def finetuning_configurations(results):
    """The configurations of the file, in the order of the script."""
    order = {name: i for i, name in enumerate((*finetuning.NETWORKS, *finetuning.NORMALIZATIONS))}
    configurations = {run.configuration for run in results}
    return sorted(configurations, key=lambda c: (c.epochs, order.get(c.network, 99), order.get(c.normalization, 99)))


def finetuning_table(results):
    """Test accuracy in percent after fine-tuning."""
    rows = []
    for configuration in finetuning_configurations(results):
        if chosen_runs(configuration, SEEDS, results):
            name = configuration.normalization.replace("batch_norm frozen", "BN, frozen")
            rows.append(
                [
                    NETWORK_LABELS[configuration.network],
                    label(name),
                    entry(accuracies(configuration, results)),
                    chosen_rate(configuration, results),
                ]
            )
    header = ["network", "normalization", "test accuracy", "learning rate"]
    return table(header, rows)


def proxies_table(results):
    """Distances of proxies from the data, by configuration: means over the seeds."""
    order = {name: i for i, name in enumerate(proxy_distance.NORMALIZATIONS)}
    configurations = {run.configuration for run in results}
    columns = ("mean_distance", "largest_mean_distance", "stddev_ratio", "largest_stddev_ratio")
    rows = []
    for configuration in sorted(
        configurations, key=lambda c: (c.network, c.batch_size, order.get(c.normalization, 99))
    ):
        found = [result for run, result in results.items() if run.configuration == configuration]
        if len(found) >= len(SEEDS):
            rows.append(
                [
                    NETWORK_LABELS[configuration.network],
                    str(configuration.batch_size),
                    label(configuration.normalization),
                    *(f"{statistics.fmean(getattr(result, name) for result in found):.2f}" for name in columns),
                    entry([100 * result.test_accuracy for result in found]),
                ]
            )
    header = ["network", "batch size", "normalization", "distance", "largest", "factor", "largest", "test accuracy"]
    return table(header, rows)


def replaced_table(rows):
    """Test accuracy in percent after the normalization is replaced, by way to do so."""

    def cell(network, normalization, way):
        asked = {"network": network, "normalization": normalization, "way": way}
        return entry([100 * float(row["test_accuracy"]) for row in rows if asked.items() <= row.items()])

    lines = [
        [
            NETWORK_LABELS[network],
            LABELS[normalization],
            *(cell(network, normalization, way) for way in replaced_accuracy.WAYS),
        ]
        for network in finetuning.NETWORKS
        for normalization in ("batch_norm", *replaced_accuracy.NORMALIZATIONS)
    ]
    header = ["network", "normalization", *(WAY_LABELS[way] for way in replaced_accuracy.WAYS)]
    return table(header, lines)


def tables(results, finetuning_results, proxy_results, replaced_rows):
    """All tables, by name."""
    return {
        **{dataset: accuracy_table(dataset, results) for dataset in accuracy.DATASETS},
        "rates": rates_table(results),
        "study": study_table(results),
        "finetuning": finetuning_table(finetuning_results),
        "proxies": proxies_table(proxy_results),
        "replaced": replaced_table(replaced_rows),
    }


def measured_tables():
    """All tables, from the committed files."""
    return tables(
        read_results(accuracy.RESULTS, accuracy.Configuration),
        read_results(finetuning.RESULTS, finetuning.Configuration, finetuning.Result),
        read_results(proxy_distance.RESULTS, accuracy.Configuration, proxy_distance.Result),
        read_rows(replaced_accuracy.RESULTS),
    )


def with_tables(text, tables):
    """Replaces the tables in the text of the page."""

    def replace(match):
        return f"{match[1]}\n{tables[match[2]]}{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", replace, text, flags=re.DOTALL)


def plot(dataset, results):
    """Plots accuracy against batch size, with a panel for each network."""
    import matplotlib.pyplot as plt

    networks = accuracy.DEFAULT_NETWORKS[dataset]
    configurations = main_configurations(dataset)
    figure, panels = plt.subplots(
        1, len(networks), figsize=(3 * len(networks) + 1, 3.4), dpi=120, layout="constrained", squeeze=False
    )
    for ax, network in zip(panels[0], networks, strict=True):
        for i, normalization in enumerate(accuracy.NORMALIZATIONS):
            found = {
                size: values
                for size in sorted(accuracy.BATCH_SIZES)
                if (values := accuracies(configurations[network, normalization, size], results))
            }
            if found:
                means = [statistics.fmean(values) for values in found.values()]
                deviations = [stddev(values) for values in found.values()]
                # Next to each other, so that error bars can be told apart.
                x = [size * 2 ** (0.12 * (i - 2.5)) for size in found]
                style = "--" if normalization in ("group_norm", "layer_norm", "none") else "-"
                # A normalization has the same colour with and without PN.
                color = {"group_norm": 1, "layer_norm": 2, "batch_norm": 0, "none": 7}[
                    normalization.removesuffix("_proxy")
                ]
                ax.errorbar(
                    x,
                    means,
                    deviations,
                    label=LABELS[normalization],
                    color=f"C{color}",
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    linewidth=1.3,
                    capsize=2,
                )
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(accuracy.BATCH_SIZES), sorted(accuracy.BATCH_SIZES))
        ax.minorticks_off()
        ax.set_title(NETWORK_LABELS[network], fontsize="medium")
        ax.set_xlabel("batch size")
        ax.grid(alpha=0.3)
    panels[0][0].set_ylabel("test accuracy in %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(PLOTS / f"{dataset}.png")
    plt.close(figure)


def main():
    """Writes the tables and the plots."""
    PLOTS.mkdir(exist_ok=True)
    results = read_results(accuracy.RESULTS, accuracy.Configuration)
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), measured_tables()), encoding="utf-8")
    for dataset in accuracy.DATASETS:
        plot(dataset, results)
    print(f"{PAGE} and the plots in {PLOTS} are up to date.")


if __name__ == "__main__":
    main()
