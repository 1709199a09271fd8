"""Backbones and tasks of KerasHub, small and with random weights: what is reached in them, and that it is exact."""

import keras
import numpy as np
import pytest
from surgery.stand_ins import StandIn, assert_same_outputs, image, randomize

import keras_proxynorm as kp

keras_hub = pytest.importorskip("keras_hub")
hub = keras_hub.models
BatchNormalization = keras.layers.BatchNormalization

# Each test checks the warnings that it is about.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model .* functional keras.Model", "ignore:.* normalizations were not reached", "ignore:No normalization"
)


def resnet(block_type="basic_block", **kwargs):
    config = {
        "input_conv_filters": [64],
        "input_conv_kernel_sizes": [7],
        "stackwise_num_filters": [64, 16],
        "stackwise_num_blocks": [1, 2],
        "stackwise_num_strides": [1, 2],
        "image_shape": (32, 32, 3),
    }
    return hub.ResNetBackbone(block_type=block_type, **{**config, **kwargs})


def efficientnet(*block_types, **kwargs):
    n = len(block_types)
    config = {
        "stackwise_width_coefficients": [1.0] * n,
        "stackwise_depth_coefficients": [1.0] * n,
        "stackwise_kernel_sizes": [3] * n,
        "stackwise_num_repeats": [2] * n,
        "stackwise_input_filters": [8] + [16] * (n - 1),
        "stackwise_output_filters": [16] * n,
        "stackwise_expansion_ratios": [1] + [4] * (n - 1),
        "stackwise_squeeze_and_excite_ratios": [0.25] * n,
        "stackwise_strides": [1] + [2] * (n - 1),
        "num_features": 32,
        "input_shape": (32, 32, 3),
    }
    return hub.EfficientNetBackbone(stackwise_block_types=list(block_types), **{**config, **kwargs})


def cspnet(block_type, stage_type, **kwargs):
    return hub.CSPNetBackbone(
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_depth=[1, 2],
        stackwise_strides=[1, 2],
        stackwise_num_filters=[16, 32],
        bottle_ratio=[0.5],
        expand_ratio=[1.0 if stage_type == "dark" else 2.0],
        block_type=block_type,
        stage_type=stage_type,
        image_shape=(32, 32, 3),
        **kwargs,
    )


def densenet():
    return hub.DenseNetBackbone(stackwise_num_repeats=[2, 2], growth_rate=8, image_shape=(32, 32, 3))


def xception():
    filters = [[8, 8], [16, 16], [24, 24], [32, 32]]
    return hub.XceptionBackbone(filters, stackwise_pooling=[False, True, True, False], image_shape=(64, 64, 3))


def retinanet(**kwargs):
    encoder = resnet(
        stackwise_num_filters=[64, 16, 16, 16],
        stackwise_num_blocks=[1] * 4,
        stackwise_num_strides=[1, 2, 2, 2],
        image_shape=(64, 64, 3),
    )
    return hub.RetinaNetBackbone(encoder, min_level=3, max_level=5, use_p5=False, image_shape=(64, 64, 3), **kwargs)


def deeplab():
    return hub.DeepLabV3Backbone(
        resnet(),
        spatial_pyramid_pooling_key="P3",
        low_level_feature_key="P2",
        upsampling_size=2,
        dilation_rates=[2],
        projection_filters=8,
        image_shape=(32, 32, 3),
    )


def mobilenet():
    return hub.MobileNetBackbone(
        stackwise_expansion=[[16, 24]],
        stackwise_num_blocks=[2],
        stackwise_num_filters=[[8, 8]],
        stackwise_kernel_size=[[3, 3]],
        stackwise_num_strides=[[2, 1]],
        stackwise_se_ratio=[[None, 0.25]],
        stackwise_activation=[["relu", "hard_swish"]],
        stackwise_padding=[[1, 1]],
        output_num_filters=32,
        depthwise_filters=8,
        depthwise_stride=2,
        depthwise_residual=False,
        last_layer_filter=32,
        squeeze_and_excite=0.5,
        input_num_filters=8,
        image_shape=(32, 32, 3),
    )


def hgnet():
    return hub.HGNetV2Backbone(
        depths=[1, 1],
        embedding_size=8,
        hidden_sizes=[16, 16],
        stem_channels=[3, 8, 8],
        hidden_act="relu",
        use_learnable_affine_block=False,
        stackwise_stage_filters=[(8, 8, 16, 1, 1, 3), (16, 8, 16, 1, 1, 3)],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, False],
        image_shape=(32, 32, 3),
    )


# How many batch normalizations are fused, and how many have no activation behind them.
REACHED = {
    "resnet": (resnet, 4, 4),
    "resnet_vd": (
        lambda: resnet("bottleneck_block_vd", input_conv_filters=[8, 8, 64], input_conv_kernel_sizes=[3, 3, 3]),
        *(9, 5),
    ),
    "resnet_v2": (lambda: resnet(use_pre_activation=True), 7, 0),
    "resnet_v2_bottleneck": (lambda: resnet("bottleneck_block", use_pre_activation=True), 10, 0),
    "resnet_bfloat16": (lambda: resnet(dtype="mixed_bfloat16"), 4, 4),
    "resnet_of_any_size": (lambda: resnet(image_shape=(None, None, 3)), 4, 4),
    "efficientnet": (lambda: efficientnet("v1", "v1"), 8, 4),
    "efficientnet_lite": (
        lambda: efficientnet("v1", "v1", activation="relu6", stackwise_squeeze_and_excite_ratios=[0, 0]),
        *(8, 4),
    ),
    "densenet": (densenet, 11, 0),
    "darknet": (lambda: cspnet("dark_block", "dark"), 9, 0),
    "csp_darknet": (lambda: cspnet("dark_block", "csp"), 14, 0),
    "csp_resnet": (lambda: cspnet("bottleneck_block", "csp", avg_down=True, cross_linear=True), 12, 5),
    "xception": (xception, 6, 4),
    "retinanet": (retinanet, 5, 7),
}
# A residual network, one with gates, and one of nested models; `test_exact` runs over all.
CONVERTED = ["resnet", "efficientnet", "retinanet"]
# Of how many batch normalizations how many are fused and plain; the others are inside layers of these classes.
HIDDEN = {
    "efficientnet_v2": (
        lambda: efficientnet("cba", "fused", "unfused"),
        *(14, 2, 0),
        {"CBABlock", "FusedMBConvBlock", "MBConvBlock"},
    ),
    "mobilenet_v3": (mobilenet, 10, 1, 0, {"DepthwiseConvBlock", "InvertedResidualBlock", "ConvBnActBlock"}),
    "hgnet": (hgnet, 12, 0, 0, {"HGNetV2Embeddings", "HGNetV2Encoder"}),
    "retinanet_fpn": (lambda: retinanet(use_fpn_batch_norm=True), 18, 5, 7, {"FeaturePyramid"}),
    "deeplab": (deeplab, 14, 6, 4, {"SpatialPyramidPooling"}),
}


def batch_norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, BatchNormalization)]


def images(model, n=2):
    return image(n, *(size or 24 for size in model.input_shape[1:])) / 128 - 1


def replace(model, **kwargs):
    with pytest.warns(UserWarning, match=f"{type(model).__name__}.*functional keras.Model"):
        replaced, report = kp.replace_normalization(model, return_report=True, **kwargs)
    assert _is_plain(replaced)
    return replaced, report


def _is_plain(model):
    return type(model) is type(keras.Model(model.inputs, model.outputs))


def counts(report):
    return report.count("fused"), report.count("plain"), len(report.layers)


def assert_loads_the_same(model, x, path):
    model.save(path / "model.keras")
    loaded = keras.saving.load_model(path / "model.keras")
    assert_same_outputs(model, loaded, x)
    return loaded


def assert_fits(model, x):
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    assert np.isfinite(model.fit(x, np.arange(len(x)), verbose=0).history["loss"]).all()


@pytest.mark.parametrize("name", REACHED)
def test_exact(name):
    make, fused, plain = REACHED[name]
    model = randomize(make())
    x = images(model)
    assert len(batch_norms(model)) == fused + plain

    replaced, report = replace(model, to=StandIn)
    assert counts(report) == (fused, plain, fused + plain)
    assert {type(layer) for layer in batch_norms(replaced)} == {StandIn}
    assert_same_outputs(model, replaced, x)


@pytest.mark.parametrize(
    "name", [name if name in CONVERTED else pytest.param(name, marks=pytest.mark.slow) for name in REACHED]
)
def test_converted(name, tmp_path):
    make, fused, plain = REACHED[name]
    model = randomize(make())
    x = images(model)
    before = [keras.ops.convert_to_numpy(weight) for weight in model.weights]
    calls = [len(layer._inbound_nodes) for layer in model._flatten_layers()]

    replaced, report = replace(model)
    assert counts(report) == (fused, plain, fused + plain)
    assert batch_norms(replaced) == []
    proxies = [layer for layer in replaced._flatten_layers() if isinstance(layer, kp.GroupNormProxy)]
    assert sum(layer.proxy is not None for layer in proxies) == fused and len(proxies) == fused + plain
    assert replaced.dtype_policy == model.dtype_policy
    replaced.jit_compile = False  # XLA takes long to compile
    assert all(np.isfinite(output).all() for output in keras.tree.flatten(replaced.predict(x, verbose=0)))
    assert_loads_the_same(replaced, x, tmp_path)

    assert len(batch_norms(model)) == fused + plain
    assert calls == [len(layer._inbound_nodes) for layer in model._flatten_layers()]
    for weight, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), old)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_inside_custom_layers_stays_and_is_reported(name):
    make, total, fused, plain, classes = HIDDEN[name]
    model = randomize(make())
    assert len(batch_norms(model)) == total

    replaced, report = replace(model)
    assert counts(report) == (fused, plain, fused + plain)
    assert len(batch_norms(replaced)) == total - fused - plain
    hiding = [layer for layer in model.layers if type(layer).__name__ in classes]
    assert {type(layer).__name__ for layer in hiding} == classes
    assert set(report.hidden) >= {layer.name for layer in hiding}
    assert sum(report.hidden.values()) == total - fused - plain
    assert any(f"{total - fused - plain} of {total} normalizations were not reached" in x for x in report.warnings)

    replaced, _ = replace(model, to=StandIn)
    assert_same_outputs(model, replaced, images(model))


def test_nothing_to_replace():
    model = hub.VGGBackbone(stackwise_num_repeats=[1, 1], stackwise_num_filters=[8, 8], image_shape=(32, 32, 3))
    with pytest.warns(UserWarning, match="No normalization layer .* was replaced. It has none in its graph."):
        replaced, report = replace(model)
    assert report.layers == ()
    assert_same_outputs(model, replaced, images(model))


def test_squeeze_and_excite_stays_as_it_was():
    model = efficientnet("v1", "v1")
    replaced, _ = replace(model)
    gates = [layer for layer in model.layers if "_se_" in layer.name]
    assert len(gates) == 20
    for layer in gates:
        assert replaced.get_layer(layer.name).get_config() == layer.get_config()


def test_channels_first():
    model = resnet(data_format="channels_first", image_shape=(3, 32, 32))
    replaced, report = replace(model)
    assert {layer.channels for layer in report.layers} == {64, 16}
    axes = {layer.axis for layer in replaced.layers if isinstance(layer, kp.GroupNormProxy)}
    assert axes == {1} and replaced.output_shape == model.output_shape


def classifier(cls=hub.ImageClassifier, backbone=None, **kwargs):
    return cls(backbone=backbone or randomize(resnet()), num_classes=3, **kwargs)


def test_a_task_becomes_a_functional_model(tmp_path):
    task = classifier()
    x = images(task)
    with pytest.warns(UserWarning, match="ResNetBackbone.*functional keras.Model"):
        replaced, report = replace(task)
    assert counts(report) == (4, 4, 8) and batch_norms(replaced) == []
    assert [layer.name for layer in replaced.layers] == [layer.name for layer in task.layers]
    assert _is_plain(replaced.get_layer(task.backbone.name))
    assert replaced.loss.get_config() == task.loss.get_config()
    assert float(replaced.optimizer.learning_rate) == float(task.optimizer.learning_rate)
    assert_fits(replaced, x)
    assert_loads_the_same(replaced, x, tmp_path)

    replaced, _ = replace(task, to=StandIn)
    assert_same_outputs(task, replaced, x)


def test_a_frozen_backbone_stays_frozen():
    task = classifier()
    task.backbone.trainable = False
    replaced, report = replace(task)
    assert all(layer.frozen for layer in report.layers)
    assert [weight.path for weight in replaced.trainable_weights] == ["predictions/kernel", "predictions/bias"]


# KerasHub says that `compile` is not called when a task is loaded, so that its optimizer has no weights yet.
@pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called", "ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize("cls", [hub.ImageClassifier, pytest.param(hub.ResNetImageClassifier, marks=pytest.mark.slow)])
def test_a_task_around_a_converted_backbone(cls, tmp_path):
    converter = keras_hub.layers.ImageConverter(image_size=(32, 32), scale=1 / 128, offset=-1)
    task = classifier(cls)
    task.preprocessor = hub.ImageClassifierPreprocessor(converter)
    backbone, _ = replace(task.backbone)
    kept = classifier(cls, backbone, preprocessor=task.preprocessor)
    kept.output_dense.set_weights(task.output_dense.get_weights())
    whole, _ = replace(task)
    assert_same_outputs(whole, kept, images(task))

    x = image(2, 40, 48, 3)  # which the preprocessor resizes
    assert_fits(kept, x)
    loaded = assert_loads_the_same(kept, images(kept), tmp_path)
    kept.save_to_preset(tmp_path / "preset")
    preset = hub.ImageClassifier.from_preset(str(tmp_path / "preset"))
    assert type(kept) is type(loaded) is type(preset) is cls
    loaded.run_eagerly = preset.run_eagerly = True
    for model in (loaded, preset):
        np.testing.assert_array_equal(model.predict(x, verbose=0), kept.predict(x, verbose=0))


def test_a_head_of_ones_own(tmp_path):
    source = randomize(resnet())
    backbone, _ = replace(source)
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)]
    model = keras.Sequential([backbone, *head])
    x = images(source)
    assert_fits(model, x)
    assert_loads_the_same(model, x, tmp_path)
