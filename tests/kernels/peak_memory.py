"""Prints how many tensors as large as the input are alive at the peak of a training step, for normalization layers.

    python peak_memory.py NORMALIZATION ACTIVATION

The model is twelve times a 1x1 convolution, a normalization and an activation.
"""

import pathlib
import re
import sys

import keras

import keras_proxynorm

SHAPE, BATCH_SIZE = (32, 32, 64), 64


def build(normalization, activation):
    """The model, compiled as a graph."""
    x = inputs = keras.Input(SHAPE)
    for _ in range(12):
        x = keras.layers.Conv2D(SHAPE[-1], 1, use_bias=False)(x)
        if normalization == "batch_norm":
            x = keras.layers.Activation(activation)(keras.layers.BatchNormalization()(x))
        else:
            x = keras_proxynorm.GroupNormProxy(32, activation=activation)(x)
    outputs = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse", jit_compile=False)
    return model


def peak(model, batch_size):
    """Peak memory in bytes of the process, after some steps.

    As Linux tells it: what `resource.getrusage` tells of a process begins with the memory of the one that started it.
    """
    images, labels = keras.random.normal((batch_size, *SHAPE)), keras.ops.zeros((batch_size, 1))
    for _ in range(3):
        model.train_on_batch(images, labels)
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    compiled = build(*sys.argv[1:])
    # The first two batch sizes make Keras trace the step, once for each size and once for any.
    before = max(peak(compiled, 1), peak(compiled, 2))
    print((peak(compiled, BATCH_SIZE) - before) / (4 * BATCH_SIZE * 32 * 32 * 64))
