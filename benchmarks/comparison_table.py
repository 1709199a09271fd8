"""Prints the table of docs/baselines.md, and writes its plot: tested limit cases, costs and accuracies.

    python3 -m pip install -e ".[examples,plots]"
    python3 benchmarks/comparison_table.py

takes seconds. It reads what `comparison.py` and `normalization_cost.py` have written: docs/comparison/compare.csv and
results/normalization_cost-*.csv.
"""

import statistics
from pathlib import Path

from measurement import read_rows

ROOT = Path(__file__).parents[1]
COMPARISON = ROOT / "docs" / "comparison" / "compare.csv"
COST_BATCH_SIZES, BATCH_SIZES = (8, 64), (2, 8, 64)
# The paper, the name here, and the limit cases with their tests.
ROWS = [
    (
        "Santurkar et al., 2018 ([1805.11604](https://arxiv.org/abs/1805.11604)): batch norm",
        "batch_norm",
        "its landscape probes are `diagnostics.loss_landscape` (tests/diagnostics/test_landscape.py)",
    ),
    (
        "Bjorck et al., 2018 ([1806.02375](https://arxiv.org/abs/1806.02375)): none",
        "none",
        "its probes are `diagnostics.loss_landscape`, `signal_propagation` (tests/diagnostics/test_propagation.py)",
    ),
    (
        "Yao et al., 2021 ([2002.05712](https://arxiv.org/abs/2002.05712)): CBN",
        "cross_iteration_batch_norm",
        "window 1 is BN; unchanged kernel: one larger batch (test_cross_iteration.py)",
    ),
    (
        "Liang et al., 2020 ([1908.04008](https://arxiv.org/abs/1908.04008)): IEBN",
        "instance_enhancement_batch_norm",
        "neutral gate: half of BN (test_instance_enhancement.py)",
    ),
    (
        "Zhou et al., 2020 ([2012.02782](https://arxiv.org/abs/2012.02782)): BGN",
        "batch_group_norm",
        "G = C is BN; N = 1 is GN (test_batch_group.py)",
    ),
    (
        "Summers and Dinneen, 2020 ([1906.03548](https://arxiv.org/abs/1906.03548)): Four Things",
        "ghost_batch_norm",
        "B' = 1 is GN; B' = N is BN; weight 1 is IN (test_ghost_batch.py)",
    ),
    (
        "Mueller et al., 2023 ([2306.04226](https://arxiv.org/abs/2306.04226)): SAM-ON",
        "batch_norm+sam_on",
        "rho = 0 is the base optimizer (tests/training/test_sharpness_aware.py)",
    ),
    (
        "Liu et al., 2021 ([2103.00673](https://arxiv.org/abs/2103.00673)): ConvNorm",
        "conv_norm",
        "unit gain at every frequency; V = 1 is the convolution (test_convolutional.py)",
    ),
    (
        "Lubana et al., 2021 ([2106.05956](https://arxiv.org/abs/2106.05956)): VN",
        "variance_norm",
        "variance 1, the mean stays (test_variance.py)",
    ),
    ("the same: FRN", "filter_response_norm", "starts with relu; mean square 1 (test_filter_response.py)"),
    ("the same: EvoNorm-S0", "evonorm_s0", "groups 1 and C; without nonlinearity affine (test_evonorm_s0.py)"),
    ("the same: EvoNorm-B0", "evonorm_b0", "without nonlinearity affine (test_evonorm_b0.py)"),
    (
        "the same: scaled WS",
        "weight_standardization",
        "filters of mean 0, variance 1; Gaussian signals keep theirs (test_weight_standardization.py)",
    ),
    (
        "the same: WN",
        "weight_normalization",
        "filters of length 1; Gaussian signals stay standardized (test_weight_normalization.py)",
    ),
    ("the same: IN", "instance_norm", "the layer of Keras (tests/surgery/test_targets.py)"),
    ("the same: LN", "layer_norm", "group norm with one group (tests/surgery/test_targets.py)"),
    ("the same: GN", "group_norm", "the layer of Keras (tests/surgery/test_targets.py)"),
    (
        "Labatie et al., 2021 ([2106.03743](https://arxiv.org/abs/2106.03743)): GN+PN",
        "group_norm_proxy",
        "without activation GN; a group per channel is IN (tests/layers/test_group_norm_proxy.py)",
    ),
    (
        "the same: LN+PN",
        "layer_norm_proxy",
        "GN+PN with one group; without activation LN (tests/layers/test_layer_norm_proxy.py)",
    ),
]


def accuracies(rows):
    """Lists of accuracies over seeds, by normalization and batch size."""
    found = {}
    for row in rows:
        key = row["normalization"], int(row["batch_size"])
        found.setdefault(key, []).append(float(row["test_accuracy"]))
    return found


def describe(values):
    """Mean in percent, with the standard deviation if there are several seeds."""
    if not values:
        return "-"
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def make_table(comparison, costs):
    """The table in Markdown, from the rows of both files."""
    ratios = {(row["normalization"], int(row["batch_size"])): row["ratio_to_batch_norm"] for row in costs}
    accuracy = accuracies(comparison)
    lines = [
        "| paper and system | name here | limit cases tested | step | batch 2 | batch 8 | batch 64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for paper, name, cases in ROWS:
        cost = " / ".join(
            f"{float(ratios[name, size]):.2f}" if (name, size) in ratios else "-" for size in COST_BATCH_SIZES
        )
        cells = [describe(accuracy.get((name, size), [])) for size in BATCH_SIZES]
        lines.append("| " + " | ".join([paper, f"`{name}`", cases, cost, *cells]) + " |")
    return "\n".join(lines) + "\n"


def measured_table():
    """The table of the committed results; of several files of costs, that with the highest versions."""
    costs = sorted((ROOT / "benchmarks" / "results").glob("normalization_cost-*.csv"))[-1]
    return make_table(read_rows(COMPARISON), read_rows(costs))


def make_plot(comparison):
    """A figure of accuracy against batch size, with a line for each normalization."""
    import matplotlib.pyplot as plt

    means, deviations = {}, {}
    for (name, size), values in sorted(accuracies(comparison).items()):
        means.setdefault(name, {})[size] = 100 * statistics.fmean(values)
        deviations.setdefault(name, []).append(100 * statistics.stdev(values) if len(values) > 1 else 0.0)
    # The legend has the order of the lines at their right ends.
    order = sorted(means, key=lambda name: -means[name][max(means[name])])
    figure, ax = plt.subplots(figsize=(8, 0.26 * max(15, len(order))), dpi=120, layout="constrained")
    for i, name in enumerate(order):
        # Next to each other, so that error bars can be told apart.
        x = [size * 2 ** (0.15 * ((i + 0.5) / len(order) - 0.5)) for size in means[name]]
        ax.errorbar(
            x,
            list(means[name].values()),
            deviations[name] if any(deviations[name]) else None,
            label=name,
            color=plt.get_cmap("tab10")(i % 10),
            # Lines of the same colour differ in marker and style.
            marker="osD^vP*"[i % 7],
            linestyle=["-", (0, (4, 1.5)), (0, (1, 1))][i // 10 % 3],
            linewidth=1.3,
            markersize=5,
            capsize=2,
        )
    fit_frame(ax, means)
    batch_sizes = sorted({size for sizes in means.values() for size in sizes})
    ax.set_xscale("log", base=2)
    ax.set_xticks(batch_sizes, batch_sizes)
    ax.set_xlabel("batch size")
    ax.set_ylabel("test accuracy in %")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small", handlelength=3)
    return figure


def fit_frame(ax, means):
    """Leaves out of a plot what diverged, because at chance it would press all others together, and names it."""
    values = {(name, size): mean for name, sizes in means.items() for size, mean in sizes.items()}
    lowest = min(value for value in values.values() if value >= max(values.values()) / 2)
    below = [f"{name} {value:.1f} at {size}" for (name, size), value in values.items() if value < lowest]
    if below:
        ax.set_ylim(bottom=lowest - 2)
        ax.set_title("Below the frame: " + ",\n".join(below), fontsize="small")


def main():
    """Prints the table and writes the plot."""
    print(measured_table(), end="")
    make_plot(read_rows(COMPARISON)).savefig(COMPARISON.with_suffix(".png"))


if __name__ == "__main__":
    main()
