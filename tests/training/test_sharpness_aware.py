"""SharpnessAwareMinimization against the papers' formulas in NumPy, against steps by hand, and in what Keras does."""

import keras
import numpy as np
import pytest
from backends import BACKEND, numpy, tensorflow_only
from distribution.processes import run_together

import keras_proxynorm as kp
from keras_proxynorm.training import SharpnessAwareMinimization
from keras_proxynorm.training.perturbation import perturbations

SIZE, FEATURES, OUTPUTS, EPSILON = 8, 4, 3, 1e-3
RATE = 0.1


def data(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((SIZE, FEATURES)).astype("float32"), rng.standard_normal((SIZE, OUTPUTS))


def make_model():
    """Layer normalization and a linear layer, the gradients of which are few lines of NumPy."""
    model = keras.Sequential(
        [keras.Input((FEATURES,)), keras.layers.LayerNormalization(epsilon=EPSILON), keras.layers.Dense(OUTPUTS)]
    )
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(rng.standard_normal(weight.shape))
    return model


def weights_of(model):
    return {weight.name: numpy(weight) for weight in model.weights}


def images(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((12, 6, 6, 3)).astype("float32"), rng.standard_normal((12, 2))


def make_network(dropout=0.5):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(4, 3, kernel_regularizer="l2"),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(dropout, seed=5),
            keras.layers.Dense(2),
        ]
    )


def fit(model, x, y, **arguments):
    return model.fit(x, y, **{"batch_size": 4, "shuffle": False, "verbose": 0, **arguments}).history


def state_of(model):
    if isinstance(model, SharpnessAwareMinimization):
        model = model.model
    return [numpy(variable) for variable in model.variables]


def assert_same_state(models, **tolerance):
    for first, second in zip(*map(state_of, models), strict=True):
        np.testing.assert_allclose(first, second, **tolerance)


# The formulas, in NumPy and float64.


def gradients_of(w, x, y, sample_weight):
    x, y = np.float64(x), np.float64(y)
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    hidden = z * w["gamma"] + w["beta"]
    error = hidden @ w["kernel"] + w["bias"] - y
    d_output = 2 * error / OUTPUTS * sample_weight[:, None] / len(x)
    d_hidden = d_output @ w["kernel"].T
    return {
        "gamma": (d_hidden * z).sum(0),
        "beta": d_hidden.sum(0),
        "kernel": hidden.T @ d_output,
        "bias": d_output.sum(0),
    }


def moved_weights(w, gradients, names, rho, adaptive=None, norm="l2", eta=0.01, normalize_bias=False):
    """The general form of the authors of SAM-ON: rho T sign(g) |Tg|^(q-1) / ||Tg||_q^(q-1), with 1/p + 1/q = 1."""
    q = {"l2": 2, "linf": 1}[norm]
    scales = {}
    for name in names:
        scales[name] = np.ones_like(w[name])
        if adaptive and (normalize_bias or name in ("kernel", "gamma")):
            layerwise = np.linalg.norm(w[name].ravel()) * (1 + eta)
            scales[name] = np.abs(w[name]) + eta if adaptive == "elementwise" else layerwise * scales[name]
    flat = np.concatenate([(scales[name] * gradients[name]).ravel() for name in names])
    length = (np.abs(flat) ** q).sum() ** (1 / q)
    moved = dict(w)
    for name in names:
        t, g = scales[name], gradients[name]
        moved[name] = w[name] + rho * t * np.sign(g) * np.abs(t * g) ** (q - 1) / length ** (q - 1)
    return moved


def step_by_formula(w, x, y, sample_weight=None, names=("gamma", "beta"), replicas=1, **arguments):
    w = {name: np.float64(value) for name, value in w.items()}
    sample_weight = np.ones(len(x)) if sample_weight is None else sample_weight
    total = dict.fromkeys(w, 0.0)
    for xs, ys, s in zip(*(np.split(array, replicas) for array in (x, y, sample_weight)), strict=True):
        moved = moved_weights(w, gradients_of(w, xs, ys, s), names, **arguments)
        for name, gradient in gradients_of(moved, xs, ys, s).items():
            total[name] = total[name] + gradient / replicas
    return {name: w[name] - RATE * total[name] for name in w}


def assert_weights(model, expected):
    for name, value in weights_of(model).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("normalize_bias", [False, True])
@pytest.mark.parametrize("scope", ["norm", "all"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", [None, "elementwise", "layerwise"])
def test_formulas(adaptive, norm, scope, normalize_bias):
    x, y = data()
    sam = SharpnessAwareMinimization(
        make_model(), 0.3, adaptive=adaptive, norm=norm, eta=0.05, scope=scope, normalize_bias=normalize_bias
    )
    names = ("gamma", "beta") if scope == "norm" else ("gamma", "beta", "kernel", "bias")
    before = weights_of(sam)
    sample_weight = np.linspace(0, 2, SIZE)
    arguments = {"adaptive": adaptive, "norm": norm, "eta": 0.05, "normalize_bias": normalize_bias}
    expected = step_by_formula(before, x, y, sample_weight, names, rho=0.3, **arguments)
    without = step_by_formula(before, x, y, sample_weight, names, rho=0.0, **arguments)
    assert np.abs(expected["kernel"] - without["kernel"]).max() > 1e-3  # so that the perturbation is seen
    sam.compile(keras.optimizers.SGD(RATE), "mse", run_eagerly=True)
    sam.train_on_batch(x, y, sample_weight=sample_weight)
    assert_weights(sam, expected)


def test_what_is_not_finite_perturbs_nothing():
    weights = [np.ones(3, "float32"), np.ones(2, "float32")]
    gradients = [np.float32([1, np.nan, 1]), np.float32([1, 1])]
    arguments = {"loss_scale": 1.0, "rho": 0.1, "adaptive": None, "norm": "l2", "eta": 0.01}
    for move in perturbations(weights, gradients, [True, True], **arguments):
        np.testing.assert_array_equal(numpy(move), 0)
    assert all(numpy(move).any() for move in perturbations(weights, [np.ones(3), np.ones(2)], [True] * 2, **arguments))


@pytest.mark.parametrize("adaptive, moves", [(None, True), ("elementwise", True), ("layerwise", False)])
def test_weights_of_zero(adaptive, moves):
    arguments = {"loss_scale": 1.0, "rho": 0.1, "adaptive": adaptive, "norm": "l2"}
    ((move,), (other,)) = (
        perturbations([np.zeros(3, "float32")], [np.ones(3, "float32")], [True], eta=eta, **arguments)
        for eta in (0.01, 0.0)
    )
    assert np.all(np.isfinite(numpy(move))) and bool(numpy(move).all()) is moves
    assert bool(numpy(other).any()) is (adaptive is None)


def test_the_radius_can_be_set_between_steps():
    x, y = data()
    sam = SharpnessAwareMinimization(make_model(), 0.3)
    sam.compile(keras.optimizers.SGD(RATE), "mse")
    for rho in (0.3, 0.0, 0.6):
        sam.rho = rho
        expected = step_by_formula(weights_of(sam), x, y, rho=rho)
        sam.train_on_batch(x, y)
        assert_weights(sam, expected)
    with pytest.raises(ValueError, match="`rho` must be .*Received: rho=-1"):
        sam.rho = -1
    assert sam.rho == 0.6


class SetRadius(keras.callbacks.Callback):
    """Sets the radius of each batch, and before the first epoch."""

    def __init__(self, radii):
        super().__init__()
        self.radii = radii

    def on_epoch_begin(self, epoch, logs=None):
        self.model.rho = 7.0

    def on_train_batch_begin(self, batch, logs=None):
        self.model.rho = self.radii[batch]


@pytest.mark.parametrize("jit_compile", [False, True] if BACKEND == "tensorflow" else ["auto"])
def test_a_callback_sets_the_radius_without_a_new_trace(jit_compile):
    x, y = data()
    sam = SharpnessAwareMinimization(make_model(), 0.0)
    sam.compile(keras.optimizers.SGD(RATE), "mse", jit_compile=jit_compile)
    expected, traces = weights_of(sam), []
    radii = (0.3, 0.0, 0.6)
    for rho in radii:
        expected = step_by_formula(expected, x, y, rho=rho)
    perturb = sam.perturb
    object.__setattr__(sam, "perturb", lambda *arguments: traces.append(1) or perturb(*arguments))
    fit(sam, *(np.concatenate([a] * 3) for a in (x, y)), batch_size=len(x), callbacks=[SetRadius(radii)])
    assert_weights(sam, expected)
    assert BACKEND == "torch" or len(traces) == 1
    assert sam.rho == 0.6 and "rho" not in [weight.name for weight in sam.weights]


def test_a_tiny_radius_is_near_none_with_layers_that_assign_to_their_weights():
    x, y = images()
    after = []
    for rho in (None, 0.0, 1e-7):
        keras.utils.set_random_seed(2)
        normalized = keras.layers.SpectralNormalization
        model = keras.Sequential([keras.Input((6, 6, 3)), normalized(keras.layers.Conv2D(4, 3))])
        model.add(keras.layers.LayerNormalization())
        model.add(keras.layers.GlobalAveragePooling2D())
        model.add(normalized(keras.layers.Dense(2)))
        trained = model if rho is None else SharpnessAwareMinimization(model, rho, scope="all")
        trained.compile(keras.optimizers.SGD(0.5), "mse")
        fit(trained, x, y)
        after.append(state_of(trained))
    for plain, none, tiny in zip(*after, strict=True):
        np.testing.assert_allclose(none, plain, atol=1e-6)
        np.testing.assert_allclose(tiny, plain, atol=1e-5)


# Steps by hand.


def test_a_radius_of_zero_is_the_optimizer_alone():
    x, y = images()
    plain, sam = make_network(), SharpnessAwareMinimization(make_network(), 0.0, update_moving_statistics="twice")
    moved = SharpnessAwareMinimization(make_network(), 0.5)
    histories = []
    for model in (plain, sam, moved):
        model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), "mse")
        histories.append(fit(model, x, y))
    assert_same_state((plain, sam), rtol=0)
    assert histories[0] == histories[1]
    assert max(np.abs(a - b).max() for a, b in zip(state_of(plain), state_of(moved), strict=True)) > 1e-3


@tensorflow_only
@pytest.mark.parametrize("update", ["once", "twice"])
def test_three_steps_by_hand(update):
    """In place: perturb the weights, put the seeds back, and then put weights and statistics back."""
    import tensorflow as tf

    x, y = images()
    sam, model = SharpnessAwareMinimization(make_network(), 0.4, update_moving_statistics=update), make_network()
    make = lambda: keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.05)  # noqa: E731
    sam.compile(make(), "mse")
    history = fit(sam, x, y)
    optimizer, losses = make(), []
    dropout, batch_norm = model.layers[4], model.layers[1]
    perturbed = [batch_norm.gamma, batch_norm.beta]
    statistics = [batch_norm.moving_mean, batch_norm.moving_variance]

    def gradients(variables, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(keras.losses.mean_squared_error(y, model(x, training=True))) + sum(model.losses)
        return loss, tape.gradient(loss, variables)

    for i in range(0, 12, 4):
        weights, seed = model.trainable_variables, numpy(dropout.seed_generator.state)
        loss, found = gradients(perturbed, x[i : i + 4], y[i : i + 4])
        losses.append(float(loss))
        saved = [numpy(v) for v in perturbed + statistics]
        length = np.sqrt(sum((numpy(g) ** 2).sum() for g in found))
        for variable, gradient in zip(perturbed, found, strict=True):
            variable.assign_add(0.4 * gradient / length)
        dropout.seed_generator.state.assign(seed)
        _, found = gradients(weights, x[i : i + 4], y[i : i + 4])
        for variable, value in zip(perturbed + (statistics if update == "once" else []), saved, strict=False):
            variable.assign(value)
        optimizer.apply(found, weights)
    assert_same_state((sam, model), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(history["loss"], np.mean(losses), rtol=1e-5)


class Probe(keras.layers.Layer):
    """Scales by gamma, draws noise, counts its calls, and keeps what it saw."""

    def build(self, shape):
        self.gamma = self.add_weight(shape=(shape[-1],), initializer="ones", name="gamma")
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")
        self.seeds, self.seen = keras.random.SeedGenerator(1), []

    def call(self, x, training=False):
        noise = keras.random.normal((FEATURES,), seed=self.seeds)
        if training:
            self.calls.assign(self.calls + 1)
            if BACKEND != "jax":  # which traces, even eagerly
                seen = (self.gamma.value, self.gamma._value, noise, x)
                self.seen.append([np.array(numpy(value)) for value in seen])
        return x * self.gamma + noise


@pytest.mark.parametrize(("update", "calls"), [("once", 1), ("twice", 2)])
def test_both_passes_see_the_same(update, calls):
    x, _ = data()
    probe = Probe()
    sam = SharpnessAwareMinimization(
        keras.Sequential([keras.Input((FEATURES,)), probe]), update_moving_statistics=update
    )
    sam.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=True)
    probe.seen.clear()
    for step in (1, 2):
        sam.train_on_batch(x, np.ones_like(x))
        assert numpy(probe.calls) == calls * step
    np.testing.assert_array_equal(numpy(probe.gamma), 1)
    if BACKEND != "jax":
        first, second, next_first, next_second = probe.seen
        for before, after in ((first, second), (next_first, next_second)):
            np.testing.assert_array_equal(before[0], 1)
            np.testing.assert_allclose(np.linalg.norm(after[0] - 1), 0.05, rtol=1e-4)  # what the pass reads
            np.testing.assert_array_equal(after[1], 1)  # what the variable holds
            np.testing.assert_array_equal(before[2], after[2])
            np.testing.assert_array_equal(before[3], after[3])
        assert np.abs(first[2] - next_first[2]).min() > 0


@pytest.mark.parametrize(("update", "times"), [("once", 1), ("twice", 2)])
def test_moving_statistics(update, times):
    x, y = data()
    layers = [keras.Input((FEATURES,)), keras.layers.BatchNormalization(momentum=0.9), keras.layers.Dense(OUTPUTS)]
    sam = SharpnessAwareMinimization(keras.Sequential(layers), update_moving_statistics=update)
    sam.compile("sgd", "mse")
    sam.train_on_batch(x, y)
    batch_norm = sam.model.layers[0]
    np.testing.assert_allclose(numpy(batch_norm.moving_mean), x.mean(0) * (1 - 0.9**times), rtol=1e-4, atol=1e-6)
    expected = 0.9**times + x.var(0) * (1 - 0.9**times)
    np.testing.assert_allclose(numpy(batch_norm.moving_variance), expected, rtol=1e-4)


# What is perturbed.


class Kept(keras.layers.Layer):
    """Has, as layers in float8 do, a variable whose gradient is its next value."""

    def build(self, shape):
        self.kept = self.add_weight(shape=(), initializer="ones", name="kept", overwrite_with_gradient=True)

    def call(self, x):
        return x


def test_scopes():
    layers = [keras.layers.Dense(4, name="frozen"), kp.LayerNormProxy(), Kept(), keras.layers.Dense(2, name="last")]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.get_layer("frozen").trainable = False

    def names(**arguments):
        return [variable.name for variable in SharpnessAwareMinimization(model, **arguments).perturbed_variables]

    assert set(names()) == {"gamma", "beta"}
    assert set(names(perturb_proxies=True)) == {"gamma", "beta", "proxy"}
    assert sorted(names(scope="all")) == ["beta", "bias", "gamma", "kernel"]
    assert sorted(names(scope="all", perturb_proxies=True)) == ["beta", "bias", "gamma", "kernel", "proxy"]
    assert names(scope=lambda variable: variable.path.endswith("last/kernel")) == ["kernel"]
    assert names(scope=lambda variable: variable.name == "proxy") == ["proxy"]


def test_predicate():
    x, y = data()
    sam = SharpnessAwareMinimization(make_model(), 0.3, scope=lambda variable: variable.name == "kernel")
    expected = step_by_formula(weights_of(sam), x, y, names=("kernel",), rho=0.3)
    sam.compile(keras.optimizers.SGD(RATE), "mse")
    sam.train_on_batch(x, y)
    assert_weights(sam, expected)


def test_a_scope_without_variables():
    x, y = data()
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(OUTPUTS)])
    sam = SharpnessAwareMinimization(model)
    sam.compile("sgd", "mse")
    with pytest.raises(ValueError, match="`scope` must select trainable.*bias, kernel.*Received: scope='norm'"):
        sam.train_on_batch(x, y)


class AddsLoss(keras.layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(keras.ops.square(x - 1)))
        return 0 * x


def test_added_losses_and_regularizers_count_in_both_passes():
    x, _ = data()
    plain, adding = (SharpnessAwareMinimization(make_model(), 0.3, scope="all") for _ in range(2))
    adding.model.add(AddsLoss())
    for sam in (plain, adding):
        sam.model.layers[-1 if sam is plain else -2].kernel.regularizer = keras.regularizers.L2(0.5)
        sam.compile(keras.optimizers.SGD(RATE), "mse")
        before = weights_of(sam)
        sam.train_on_batch(x, np.ones((SIZE, OUTPUTS)) * (sam is plain))
    assert_weights(adding, weights_of(plain))

    # A loss that is the regularizer alone: its gradient is the weights.
    only = SharpnessAwareMinimization(make_model(), 0.3, scope="all")
    only.model.layers[-1].kernel.regularizer = keras.regularizers.L2(0.5)
    only.compile(keras.optimizers.SGD(RATE), lambda y, y_pred: keras.ops.sum(0 * y_pred, axis=-1))
    only.train_on_batch(x, np.ones((SIZE, OUTPUTS)))
    kernel = before["kernel"]
    expected = kernel - RATE * kernel * (1 + 0.3 / np.linalg.norm(kernel))
    assert_weights(only, {**before, "kernel": expected})


def test_embeddings():
    """TensorFlow has their gradients as slices, with rows more than once; here against the product with a matrix."""
    indices, (_, y) = np.array([0, 1, 1, 5, 5, 5, 2, 0]), data()
    embedding = keras.Sequential([keras.Input((), dtype="int32"), keras.layers.Embedding(6, OUTPUTS)])
    matrix = keras.Sequential([keras.Input((6,)), keras.layers.Dense(OUTPUTS, use_bias=False)])
    matrix.set_weights(embedding.get_weights())
    for model, x in ((embedding, indices), (matrix, np.eye(6)[indices])):
        sam = SharpnessAwareMinimization(model, 0.5, scope="all", adaptive="elementwise")
        sam.compile(keras.optimizers.SGD(RATE), "mse")
        sam.train_on_batch(x, y)
    np.testing.assert_allclose(*(numpy(model.weights[0]) for model in (embedding, matrix)), rtol=1e-5, atol=1e-6)


# Ways to train.

WAYS = {
    "graph": {"jit_compile": False},
    "several steps": {"jit_compile": False, "steps_per_execution": 3},
    "xla": {"jit_compile": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(way):
    """All without dropout, because XLA draws other random numbers."""
    if BACKEND == "torch" and way != "graph":
        pytest.skip("torch.compile takes minutes, and there is no steps_per_execution")
    x, y = images()
    models = []
    for arguments in ({"run_eagerly": True}, WAYS[way]):
        models.append(SharpnessAwareMinimization(make_network(dropout=0.0), 0.4, adaptive="elementwise"))
        models[-1].compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", weighted_metrics=["mae"], **arguments)
        fit(models[-1], x, y, sample_weight=np.linspace(0, 1, 12))
    assert_same_state(models, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_policies(policy):
    x, y = data()
    keras.config.set_dtype_policy(policy)
    model = make_model()
    keras.config.set_dtype_policy("float32")
    sam = SharpnessAwareMinimization(model, 0.3, scope="all")  # with the policy of the model, not with today's
    expected = step_by_formula(weights_of(sam), x, y, names=("gamma", "beta", "kernel", "bias"), rho=0.3)
    sam.compile(keras.optimizers.SGD(RATE), "mse")
    assert isinstance(sam.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    sam.train_on_batch(x, y)
    tolerance = {"float32": 1e-5, "mixed_bfloat16": 0.03, "mixed_float16": 0.003}[policy]
    for name, value in weights_of(sam).items():
        assert value.dtype == "float32"
        np.testing.assert_allclose(value, expected[name], atol=tolerance)


@pytest.mark.parametrize("update", ["once", "twice"])
def test_overflow_skips_the_step(update):
    """Twice too large for float16 at first, and then not."""
    x, y = data()
    keras.config.set_dtype_policy("mixed_float16")
    model, scale = make_model(), 2.0**18
    sam = SharpnessAwareMinimization(model, 0.3, scope="all", update_moving_statistics=update)
    sam.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(RATE), initial_scale=scale), "mse")
    before = weights_of(sam)
    sam.train_on_batch(x, y)
    for name, value in weights_of(sam).items():
        np.testing.assert_array_equal(value, before[name])
    assert numpy(sam.optimizer.dynamic_scale) == scale / 2
    for _ in range(8):
        sam.train_on_batch(x, y)
    for name, value in weights_of(sam).items():
        assert np.all(np.isfinite(value)) and np.any(value != before[name])


def test_the_scale_of_the_loss_does_not_matter():
    """The square of the scaled gradient has no float32."""
    x, y = data()
    sam = SharpnessAwareMinimization(make_model(), 0.3)
    expected = step_by_formula(weights_of(sam), x, y, rho=0.3)
    sam.compile(keras.optimizers.SGD(RATE, loss_scale_factor=2.0**100), "mse")
    sam.train_on_batch(x, y)
    assert_weights(sam, expected)


class Branches(keras.Model):
    """Takes a dictionary, gives one, has no argument `training`, and is built by its first call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(4), keras.layers.Dense(4)
        self.normalization = keras.layers.BatchNormalization()

    def call(self, inputs):
        return {
            "sum": self.normalization(self.first(inputs["a"]) + self.second(inputs["b"])),
            "difference": self.first(inputs["a"]) - self.second(inputs["b"]),
        }


def test_several_inputs_and_outputs():
    x, _ = data()
    inputs, targets = {"a": x, "b": x[:, :2]}, {"sum": x, "difference": 2 * x}
    model = Branches()
    sam = SharpnessAwareMinimization(model, 0.3)
    sam.compile("sgd", {"sum": "mse", "difference": "mae"}, metrics={"sum": ["mae"]})
    sam.predict(inputs, verbose=0)
    expected = model(inputs, training=True)  # in training: batch statistics
    expected = {name: np.abs(numpy(value) - targets[name]) for name, value in expected.items()}
    losses = {"sum": np.mean(expected["sum"] ** 2), "difference": np.mean(expected["difference"])}
    history = fit(sam, inputs, targets, batch_size=SIZE)
    # Those of the first pass, each counted once.
    assert {name: pytest.approx(values, rel=1e-4) for name, values in history.items()} == {
        "loss": [sum(losses.values())],
        "sum_loss": [losses["sum"]],
        "difference_loss": [losses["difference"]],
        "sum_mae": [np.mean(expected["sum"])],
    }
    assert np.any(numpy(model.normalization.moving_mean) != 0)  # so `training` reached it


def test_masks_and_integers_reach_the_loss_and_the_model():
    """In float16, 2049 is 2048."""
    indices = np.array([[2049, 0, 3], [1, 2, 0]])
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((3,), dtype="int32")
    model = keras.Model(inputs, keras.layers.Embedding(2050, 2, mask_zero=True)(inputs))
    sam = SharpnessAwareMinimization(model, scope="all")
    for trained in (model, sam):
        trained.compile("sgd", "mse")
    targets = np.ones((2, 3, 2))
    expected = model.evaluate(indices.astype("float32"), targets, verbose=0)
    assert sam.train_on_batch(indices.astype("float32"), targets) == pytest.approx(expected, rel=1e-3)
    values = numpy(model.layers[-1].embeddings)[[2049, 3, 1, 2]]
    assert expected == pytest.approx(np.mean((values - 1) ** 2), rel=0.01)


def test_class_weights():
    x, labels = data()[0], np.arange(SIZE) % OUTPUTS
    models = [SharpnessAwareMinimization(make_model(), 0.3) for _ in range(2)]
    weights = np.array([2.0, 0.0, 0.5])
    for sam, arguments in zip(
        models, ({"class_weight": dict(enumerate(weights))}, {"sample_weight": weights[labels]}), strict=True
    ):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        sam.compile("sgd", loss, metrics=["accuracy"], run_eagerly=True)
        history = fit(sam, x, labels, **arguments)
        assert set(history) == {"loss", "accuracy"}
    assert_same_state(models, rtol=1e-6)


def test_validation_callbacks_and_prediction():
    x, y = data()
    sam = SharpnessAwareMinimization(make_model(), 0.3)
    sam.compile(keras.optimizers.SGD(-0.1), "mse", run_eagerly=True)  # up, where it is worse
    before = sam.evaluate(x, y, verbose=0)
    stop = keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
    history = fit(sam, x, y, validation_data=(x, y), epochs=5, callbacks=[stop])
    assert before < history["val_loss"][0] < history["val_loss"][1] and len(history["loss"]) == 2
    assert sam.evaluate(x, y, verbose=0) == pytest.approx(history["val_loss"][0], rel=1e-5)
    np.testing.assert_allclose(sam.predict(x, verbose=0), sam.model.predict(x, verbose=0), rtol=1e-5)


def test_weight_decay_can_exclude_normalization():
    sam = SharpnessAwareMinimization(make_model())
    optimizer = kp.exclude_norm_from_weight_decay(keras.optimizers.AdamW(), sam)
    decayed = {weight.name for weight in sam.weights if optimizer._use_weight_decay(weight)}
    assert decayed == {"kernel", "bias"}


# Saving, and other processes.


@keras.saving.register_keras_serializable(package="test_sharpness_aware")
def is_kernel(variable):
    return variable.name == "kernel"


GO_ON = """
import sys
import keras
import numpy as np
import keras_proxynorm.training
keras.saving.register_keras_serializable("test_sharpness_aware", "is_kernel")(lambda v: v.name == "kernel")
path, x, y, output = sys.argv[1:]
sam = keras.models.load_model(path)
history = sam.fit(np.load(x), np.load(y), batch_size=4, shuffle=False, verbose=0).history
np.savez(output, history["loss"], *sam.get_weights())
"""


def saved_after_training(folder):
    """Without dropout, because Keras does not save how far a layer has drawn."""
    x, y = images()
    arguments = {"adaptive": "layerwise", "norm": "linf", "eta": 0.02, "normalize_bias": True, "perturb_proxies": True}
    sam = SharpnessAwareMinimization(
        make_network(dropout=0.0), 0.1, scope=is_kernel, update_moving_statistics="twice", name="sharp", **arguments
    )
    sam.compile(keras.optimizers.Adam(0.01), "mse")
    fit(sam, x, y)
    sam.save(folder / "sam.keras")
    return sam, x, y, {**arguments, "rho": 0.1, "update_moving_statistics": "twice", "name": "sharp"}


def test_what_is_loaded_goes_on(tmp_path):
    sam, x, y, arguments = saved_after_training(tmp_path)
    loaded = keras.models.load_model(tmp_path / "sam.keras")
    config = loaded.get_config()
    assert {key: config[key] for key in arguments} == arguments
    assert loaded.scope is is_kernel
    assert fit(loaded, x, y)["loss"] == pytest.approx(fit(sam, x, y)["loss"], rel=1e-5)
    assert_same_state((loaded, sam), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_fresh_process_goes_on(tmp_path):
    sam, x, y, _ = saved_after_training(tmp_path)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    run_together(["-c", GO_ON, *(tmp_path / name for name in ("sam.keras", "x.npy", "y.npy", "result.npz"))])
    expected = [fit(sam, x, y)["loss"], *sam.get_weights()]
    with np.load(tmp_path / "result.npz") as found:
        for name, value in zip(found.files, expected, strict=True):
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_what_the_first_step_builds_is_perturbed_in_it(tmp_path):
    x, y = data()
    model = keras.Sequential([keras.layers.LayerNormalization(epsilon=EPSILON), keras.layers.Dense(OUTPUTS)])
    sam = SharpnessAwareMinimization(model, 0.3)
    sam.compile(keras.optimizers.SGD(RATE), "mse")
    sam.train_on_batch(x, y)
    assert sam.built and numpy(sam.optimizer.iterations) == 1
    kernel = numpy(model.layers[-1].kernel)
    sam.save(tmp_path / "sam.keras")
    loaded = keras.models.load_model(tmp_path / "sam.keras")
    np.testing.assert_array_equal(numpy(loaded.model.layers[-1].kernel), kernel)
    expected = step_by_formula(weights_of(sam), x, y, rho=0.3)
    loaded.train_on_batch(x, y)
    assert_weights(loaded, expected)


MIRRORED = """
import sys
import keras
import numpy as np
import tensorflow as tf
from keras_proxynorm.training import SharpnessAwareMinimization
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
path, x, y, output = sys.argv[1:]
x, y = np.load(x), np.load(y)
class Calls(keras.layers.Layer):
    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, aggregation="mean", name="calls")
    def call(self, x, training=False):
        if training:
            self.calls.assign(self.calls + 1)
        return x
with strategy.scope():
    model = keras.models.load_model(path)
    model.add(Calls())
    sam = SharpnessAwareMinimization(model, 0.3, adaptive="elementwise", update_moving_statistics="twice")
    sam.compile(keras.optimizers.SGD(0.1), "mse")
history = sam.fit(x, y, batch_size=len(x), shuffle=False, verbose=0).history
np.savez(output, loss=history["loss"], **{weight.name: weight.numpy() for weight in sam.weights})
"""


@pytest.mark.slow
@tensorflow_only
def test_replicas_perturb_by_their_own_gradients(tmp_path):
    x, y = data()
    model = make_model()
    paths = [tmp_path / name for name in ("model.keras", "x.npy", "y.npy", "result.npz")]
    model.save(paths[0])
    np.save(paths[1], x)
    np.save(paths[2], y)
    run_together(["-c", MIRRORED, *paths], CUDA_VISIBLE_DEVICES="-1")
    before = weights_of(model)
    expected = step_by_formula(before, x, y, replicas=2, rho=0.3, adaptive="elementwise")
    together = step_by_formula(before, x, y, rho=0.3, adaptive="elementwise")
    assert np.abs(expected["kernel"] - together["kernel"]).max() > 1e-3
    model.compile("sgd", "mse")
    expected |= {"calls": 2, "loss": model.evaluate(x, y, verbose=0)}
    with np.load(paths[3]) as found:
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


# Arguments.

WRONG = {
    "model": ["resnet", None],
    "rho": [-0.1, float("nan"), float("inf"), "0.05", None, True],
    "eta": [-1.0, None],
    "adaptive": ["filterwise", True],
    "norm": ["l1", 2],
    "scope": ["gamma", None],
    "perturb_proxies": ["yes", 1],
    "normalize_bias": [None],
    "update_moving_statistics": ["never", 2],
}


class OwnLoss(keras.Model):
    def compute_loss(self, *args, **kwargs):
        return 100 * super().compute_loss(*args, **kwargs)


def test_models_with_a_step_of_their_own_are_refused():
    with pytest.raises(ValueError, match="`model` must be .* without train_step.* but has \\['compute_loss'\\]"):
        SharpnessAwareMinimization(OwnLoss())
    with pytest.raises(ValueError, match="but has \\['train_step'\\]"):
        SharpnessAwareMinimization(SharpnessAwareMinimization(make_model()))


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_arguments(argument):
    for value in WRONG[argument]:
        with pytest.raises(ValueError, match=f"`{argument}` must be .*Received: {argument}="):
            SharpnessAwareMinimization(**{"model": make_model(), argument: value})
