"""Trains each model in one replica and in two, on virtual CPU devices, which must be set up before TensorFlow starts.

Run as `python -m distribution.train_mirrored OUTPUT.npz`.
"""

import sys

import numpy as np
import tensorflow as tf
from distribution import samples

from keras_proxynorm.training import CalibrateProxies


def main():
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    images, labels = samples.data()
    cases = {
        "proxy_norm": (samples.PROXY_NORM, []),
        "calibrated": (samples.PROXY_NORM, [CalibrateProxies(images[: samples.BATCH_SIZE], every=2)]),
        "batch_norm": (samples.BATCH_NORM, []),
    }
    results = {}
    for name, (normalizations, callbacks) in cases.items():
        for replicas, scope in ((1, tf.distribute.get_strategy().scope), (2, strategy.scope)):
            with scope():
                model = samples.model(normalizations)
            for key, value in samples.fit(model, images, labels, samples.BATCH_SIZE, callbacks).items():
                results[f"{name}/{replicas}/{key}"] = value
    np.savez(sys.argv[1], **results)


if __name__ == "__main__":
    main()
