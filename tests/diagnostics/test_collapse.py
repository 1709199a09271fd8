"""Networks built to be in trouble of each kind, and one that is not."""

import keras
import numpy as np
import pytest
from diagnostics.samples import L, images, normal, single, small, unchanged

import keras_proxynorm as kp
from keras_proxynorm.diagnostics import collapse_report


def report(model, data, *args, **options):
    return collapse_report(model, data, *args, **{"verbose": 0, **options})


def problems(found):
    return [(finding.layer, finding.problem) for finding in found.findings]


def offsets(norm, channels=8):
    """Channels that are nearly constant in front of a norm over channels."""
    inputs = keras.Input((8, 8, channels))
    shift = normal(channels, scale=10)
    return keras.Model(inputs, norm(L.Rescaling(1.0, offset=shift)(inputs)))


def varied(count=24, channels=8):
    """Samples that differ in contrast and in the means of their channels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, 8, 8, channels)) * rng.uniform(0.5, 1.5, (count, 1, 1, channels))
    return (x + 0.3 * rng.standard_normal((count, 1, 1, channels))).astype("float32")


@pytest.mark.parametrize(
    "make", [lambda: L.GroupNormalization(1, name="norm"), lambda: L.LayerNormalization(axis=(1, 2, 3), name="norm")]
)
def test_channel_wise_collapse(make):
    model = offsets(make())
    with unchanged(model):
        found = report(model, varied())
    assert problems(found) == [("norm", "channel-wise collapse")]
    (finding,) = found.findings
    share = found.power.fractions[0, 0]
    assert share > 0.9 and finding.evidence == f"{share:.0%} of its power is in the means of the channels"
    replaceable = isinstance(model.get_layer("norm"), L.GroupNormalization)
    assert ('replace_normalization(model, to="layer_norm_proxy", layers=' in finding.advice) is replaceable
    assert np.isnan(found.mean_distance).all() and np.isnan(found.stddev_ratio).all()


def test_channel_wise_collapse_of_a_proxy():
    found = report(offsets(kp.LayerNormProxy(name="norm")), varied())
    assert ("norm", "channel-wise collapse") in problems(found) and ("norm", "proxy far from data") in problems(found)
    assert "proxies" in found.findings[0].advice and "replace_normalization" not in found.findings[0].advice


@pytest.mark.parametrize("groups", [-1, 8])
def test_no_instance_variability(groups):
    found = report(single(L.GroupNormalization(groups, epsilon=1e-6, name="norm"), (8, 8, 8)), varied())
    assert problems(found) == [("norm", "no instance variability")]
    assert "fewer groups" in found.findings[0].advice and "one channel in each" in found.findings[0].advice


def test_samples_that_are_all_alike():
    x = np.repeat(varied(1), 6, axis=0)
    found = report(single(L.GroupNormalization(2, name="norm"), (8, 8, 8)), x)
    assert problems(found) == [("norm", "no instance variability")]
    assert "data that differ" in found.findings[0].advice


def test_one_sample_cannot_say_that_samples_are_alike():
    found = report(single(L.GroupNormalization(2, name="norm"), (8, 8, 8)), varied(1))
    assert "no instance variability" not in dict(found.findings and problems(found)).values()


def far_proxy(mean=0.0, stddev=0.0, **options):
    model = single(kp.GroupNormProxy(2, name="norm", **options), (8, 8, 8))
    model.get_layer("norm").proxy.assign(np.stack([np.full(8, mean), np.full(8, stddev)]))
    return model


@pytest.mark.parametrize("mean, stddev", [(2.0, 0.0), (0.0, 2.0), (0.0, -0.8)])
def test_proxy_far_from_data(mean, stddev):
    found = report(far_proxy(mean, stddev), varied())
    assert problems(found) == [("norm", "proxy far from data")]
    assert "weight decay" in found.findings[0].advice
    if mean:
        np.testing.assert_allclose(found.mean_distance, 2, rtol=0.1)
    else:
        np.testing.assert_allclose(found.stddev_ratio, max(1 + stddev, 1 / (1 + stddev)), rtol=0.2)


@pytest.mark.parametrize("how", ["learn_proxy", "layer"])
def test_a_proxy_that_does_not_learn(how):
    model = far_proxy(2.0, learn_proxy=how != "learn_proxy")
    model.get_layer("norm").trainable = how != "layer"
    (finding,) = report(model, varied()).findings
    assert ("learn_proxy=True" if how == "learn_proxy" else "layer.trainable = True") in finding.advice


def test_healthy():
    for model in (far_proxy(), single(L.GroupNormalization(2), (8, 8, 8)), single(L.BatchNormalization(), (8, 8, 8))):
        found = report(model, varied())
        assert not found.findings
        assert "found nothing wrong" in str(found)
    np.testing.assert_allclose(report(far_proxy(), varied()).mean_distance, 0, atol=0.3)


def moving(x, **options):
    """A batch normalization that knows the data exactly."""
    model = single(L.BatchNormalization(name="norm", **options), x.shape[1:])
    layer, axes = model.get_layer("norm"), tuple(range(x.ndim - 1))
    layer.moving_mean.assign(x.mean(axes))
    layer.moving_variance.assign(x.var(axes))
    return model


def test_moving_statistics_far_from_data():
    x = varied()
    for other in (x + 2, 4 * x, 0.1 * x):
        model = moving(x)
        found = report(model, other.astype("float32"))
        assert ("norm", "moving statistics far from data") in problems(found)
        assert "momentum" in found.findings[-1].advice
        # It does not count on them in training, but does when frozen.
        assert not report(model, other.astype("float32"), training=True).findings
        model.get_layer("norm").trainable = False
        assert ("norm", "moving statistics far from data") in problems(
            report(model, other.astype("float32"), training=True)
        )
    assert not report(moving(x), x).findings


@pytest.mark.parametrize("scale", [0.03, 0.003])
def test_moving_statistics_of_small_activations_are_not_far(scale):
    """Their variance is small beside epsilon; the moving averages are right."""
    x = (scale * varied()).astype("float32")
    assert "moving statistics far from data" not in dict(map(reversed, problems(report(moving(x), x))))


def test_moving_statistics_with_a_dead_channel_are_not_far():
    x = varied()
    x[..., 0] = 0
    assert not report(moving(x), x).findings


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("make", [L.LayerNormalization, L.BatchNormalization, kp.LayerNormProxy])
def test_values_that_are_not_finite_are_not_healthy(make, value):
    model = small(make(name="norm"))
    model.get_layer("conv").bias.assign(np.full(8, value))
    found = report(model, images()[0])
    assert found.findings and "nothing wrong" not in str(found)


def test_printed():
    inputs = keras.Input((8, 8, 8))
    shift = L.Rescaling(1.0, offset=normal(8, scale=10))
    x = L.GroupNormalization(1, name="one")(shift(inputs))
    x = L.GroupNormalization(1, name="two")(L.Rescaling(1.0, offset=normal(8, scale=10))(x))
    x = L.GroupNormalization(-1, epsilon=1e-9, name="three")(x)
    found = report(keras.Model(inputs, x), varied())
    text = str(found)
    assert text.startswith("Looked at 3 normalization layers and found something wrong with 3.")
    assert "Channel-wise collapse (2 of 3 layers): channels are nearly constant" in text
    assert "No instance variability (1 of 3 layers):" in text
    for finding in found.findings:
        assert f"  {finding.layer}: {finding.evidence}" in text
        assert str(finding) == f"{finding.layer}: {finding.problem}: {finding.evidence}"
        # Each piece of advice once.
        assert " ".join(text.split()).count(f" Try {finding.advice}") == 1
        assert max(map(len, text.splitlines())) <= 100


def test_printed_for_one_layer():
    text = str(report(far_proxy(), varied()))
    assert "1 normalization layer " in text or "1 normalization layers" not in text


def test_columns():
    found = report(far_proxy(), varied())
    assert list(found.to_dict()) == [
        "layer",
        "P1",
        "P2",
        "P3",
        "P4",
        "power",
        "mean_distance",
        "stddev_ratio",
        "problems",
    ]
    assert len(found) == 1


def test_shared_and_other_layers():
    """The same options as the decomposition has."""
    found = report(small(), images()[0], "conv")
    assert found.names == ("conv",)
    with pytest.raises(ValueError, match="Argument `layers`"):
        report(small(), images()[0], "nothing")


def test_without_positions():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 8)).astype("float32")
    for layer in (L.LayerNormalization(), kp.LayerNormProxy(), L.BatchNormalization()):
        assert not report(single(layer, (8,)), x).findings


def test_advice_can_be_followed():
    """What it says to call replaces the layers in question."""
    model = keras.Sequential([keras.Input((8, 8, 3))])
    for _ in range(2):
        model.add(L.Conv2D(16, 3, bias_initializer=keras.initializers.RandomNormal(stddev=5.0, seed=0)))
        model.add(L.GroupNormalization(4))
        model.add(L.ReLU())
    found = [f for f in report(model, images()[0]).findings if f.problem == "channel-wise collapse"]
    assert (
        found and 'replace_normalization(model, to="group_norm_proxy", layers=keras.layers.GroupNorm' in found[0].advice
    )
    replaced = kp.replace_normalization(model, to="group_norm_proxy", layers=keras.layers.GroupNormalization)
    assert sum(isinstance(layer, kp.GroupNormProxy) for layer in replaced.layers) == 2


def test_untrained_batch_normalization_is_not_said_to_collapse():
    model = keras.Sequential([keras.Input((8, 8, 3))])
    for _ in range(3):
        model.add(L.Conv2D(16, 3))
        model.add(L.BatchNormalization())
        model.add(L.ReLU())
    x = np.random.default_rng(0).uniform(size=(32, 8, 8, 3))
    found = report(model, x)
    assert {finding.problem for finding in found.findings} == {"moving statistics far from data"}
    assert "training=True" in found.findings[0].advice
    assert "channel-wise collapse" not in {f.problem for f in report(model, x, training=True).findings}


def test_one_sample_is_not_said_to_vary():
    assert "no instance variability" not in {f.problem for f in report(small(), images()[0][:1]).findings}
