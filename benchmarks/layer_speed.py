"""Times normalization layers with their activation: batch norm, Keras's group norm, and proxy normalization.

    python benchmarks/layer_speed.py

takes about five minutes. "graph" is what `fit` runs on a CPU, "xla" what it runs with an accelerator. The contenders
take turns in one process; the table has the medians in milliseconds and, last, the geometric mean over the first three
shapes as ratios to batch norm and to Keras's group norm with the same activation.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from measurement import geometric_mean, in_own_process, medians_in_turns, results_file, set_threads, write_results

SHAPES = [(16, 56, 56, 64), (8, 14, 14, 1024), (2, 56, 56, 256), (1, 28, 28, 512)]
MODES = ["graph", "xla"]
PASSES = ["forward", "forward+backward"]
BASELINES = ["BatchNormalization", "GroupNormalization(32)"]


def contenders():
    """Functions that make the layers to call one after the other, by name and activation."""
    from keras import layers

    import keras_proxynorm

    makers = {("no normalization", "relu"): lambda: [layers.Activation("relu")]}
    for activation in ("relu", "silu"):
        norms = {
            "BatchNormalization": layers.BatchNormalization,
            "GroupNormalization(32)": lambda: layers.GroupNormalization(32),
            "GroupNormalization(1)": lambda: layers.GroupNormalization(1),
        }
        for name, norm in norms.items():
            makers[name, activation] = lambda norm=norm, a=activation: [norm(), layers.Activation(a)]
        makers["GroupNormProxy(32)", activation] = lambda a=activation: [
            keras_proxynorm.GroupNormProxy(32, activation=a)
        ]
        makers["LayerNormProxy", activation] = lambda a=activation: [keras_proxynorm.LayerNormProxy(activation=a)]
    return makers


def compiled_passes(make, x, upstream, mode):
    """Forward, and forward with the gradients of inputs and weights, as functions without arguments."""
    import tensorflow as tf

    stack = make()

    def forward(x):
        for layer in stack:
            x = layer(x, training=True)
        return x

    def forward_and_backward(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = forward(x)
        weights = [weight.value for layer in stack for weight in layer.trainable_weights]
        return y, tape.gradient(y, [x, *weights], upstream)

    forward(x)  # builds
    compiled = [tf.function(function, jit_compile=mode == "xla") for function in (forward, forward_and_backward)]
    return [lambda: compiled[0](x), lambda: compiled[1](x, upstream)]


def measure(threads, precision, repeats):
    """All contenders, modes and shapes in one process: a list of rows."""
    set_threads(threads)
    import keras
    import tensorflow as tf

    keras.config.set_dtype_policy(precision)
    rows = []
    for mode in MODES:
        for shape in SHAPES:
            dtype = keras.config.dtype_policy().compute_dtype
            x, upstream = (tf.cast(tf.random.stateless_normal(shape, (0, seed)), dtype) for seed in (1, 2))
            functions = {}
            for key, make in contenders().items():
                for passes, function in zip(PASSES, compiled_passes(make, x, upstream, mode), strict=True):
                    functions[key, passes] = function
            for ((name, activation), passes), seconds in medians_in_turns(functions, repeats).items():
                rows.append(
                    {
                        "mode": mode,
                        "passes": passes,
                        "activation": activation,
                        "layer": name,
                        "shape": "x".join(map(str, shape)),
                        "threads": threads,
                        "precision": precision,
                        "repeats": repeats,
                        "milliseconds": round(1e3 * seconds, 3),
                    }
                )
            keras.utils.clear_session()
    return rows


def print_table(rows):
    """The medians by shape, and the ratios to the baselines."""
    shapes = ["x".join(map(str, shape)) for shape in SHAPES]
    times = {
        tuple(row[k] for k in ("mode", "passes", "activation", "layer", "shape")): row["milliseconds"] for row in rows
    }
    for mode in MODES:
        for passes in PASSES:
            print(f"\n{mode}, {passes}, {rows[0]['precision']}, {rows[0]['threads']} threads: ms")
            print(f"{'':<32}" + "".join(f"{shape:>14}" for shape in shapes) + f"{'/BN':>8}{'/GN(32)':>8}")
            for name, activation in contenders():
                mine = [times[mode, passes, activation, name, shape] for shape in shapes]
                ratios = []
                for base in BASELINES:
                    theirs = [times[mode, passes, activation, base, shape] for shape in shapes]
                    ratios.append(geometric_mean(a / b for a, b in list(zip(mine, theirs, strict=True))[:3]))
                label = f"{name}, {activation}" if name != "no normalization" else activation
                print(f"{label:<32}" + "".join(f"{t:>14.2f}" for t in mine) + "".join(f"{r:>8.2f}" for r in ratios))


def main():
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()], help="default: 1 and all")
    parser.add_argument("--precision", nargs="+", default=["float32"], help="dtype policies; default: float32")
    parser.add_argument("--repeats", type=int, default=25, help="turns that are measured; default: 25")
    arguments = parser.parse_args()
    for precision in arguments.precision:
        for threads in dict.fromkeys(arguments.threads):
            rows = in_own_process(measure, threads, precision, arguments.repeats)
            print_table(rows)
            threads_name = "1thread" if threads == 1 else f"{threads}threads"
            output = results_file("layer_speed", threads_name, precision)
            write_results(output, rows)
            print(f"Written to {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
