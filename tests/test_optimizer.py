import itertools
import re
import warnings

import keras
import numpy as np
import pytest
import reference
from keras import ops
from models import assert_close
from models import assert_same
from models import cnn
from models import cross_entropy
from models import data
from models import image_data
from models import mlp
from models import PLAIN
from models import product_loss
from models import to_numpy
from models import weights

import keras_adafisher


def linear(rng, inputs=4, outputs=3):
    """One dense layer, for which everything can be computed by hand."""
    layer = keras.layers.Dense(outputs)
    model = keras.Sequential([keras.Input((inputs,)), layer])
    steps = [
        (
            rng.normal(size=(5, inputs)).astype("float32"),
            rng.normal(size=(5, outputs)).astype("float32"),
        )
        for _ in range(7)
    ]
    return model, layer, steps


@pytest.mark.parametrize(
    ("factor_update_steps", "weight_decay", "rule"),
    [
        (1, None, {}),
        (3, 0.1, {}),
        (100, None, {}),
        (1, 0.1, PLAIN),
        (3, None, PLAIN),
        (100, 0.1, PLAIN),
        (2, None, {**PLAIN, "normalization": "mean"}),
        (2, None, {**PLAIN, "nesterov": True}),
        (2, None, {**PLAIN, "rms_decay": 0.7}),
    ],
)
def test_weights_follow_the_algorithm(
    factor_update_steps, weight_decay, rule, rng
):
    model, layer, steps = linear(rng)
    arguments = {"beta": 0.8, "damping": 0.02, "gamma_1": 0.9, "gamma_2": 0.2}
    optimizer = keras_adafisher.AdaFisher(
        learning_rate=0.01,
        factor_update_steps=factor_update_steps,
        weight_decay=weight_decay,
        **arguments,
        **rule,
    )
    model.compile(optimizer, loss=product_loss)
    kernel, bias = (w.astype("float64") for w in layer.get_weights())

    # What the arguments that the rule leaves out default to.
    rule = {
        "normalization": "mean",
        "nesterov": True,
        "rms_decay": 0.99,
        **rule,
    }
    factors = reference.LinearFactors(4, 3, True, rule.pop("normalization"))
    rule["interval"] = factor_update_steps
    momenta = [reference.Momentum(w.shape, 0.8, **rule) for w in (kernel, bias)]
    for t, (x, r) in enumerate(steps):
        model.train_on_batch(x, r)
        s = r / r.size
        if t % factor_update_steps == 0:
            factors.update(x, s, 0.9, 0.2)
        fishers = factors.fisher(0.02)
        gradients = (x.T @ s, s.sum(axis=0))
        decay = 1 - 0.01 * (weight_decay or 0.0)
        kernel, bias = (
            w * decay - 0.01 * momentum.step(g, fisher)
            for w, momentum, g, fisher in zip(
                (kernel, bias), momenta, gradients, fishers, strict=True
            )
        )
        # `1 - 0.99**t` has five digits in single precision, as in Adam.
        assert_close(layer.get_weights(), [kernel, bias], 1e-5)


def test_the_first_step_by_hand():
    """Numbers that can be checked with pencil and paper."""
    layer = keras.layers.Dense(2, use_bias=False)
    model = keras.Sequential([keras.Input((2,)), layer])
    layer.set_weights([np.zeros((2, 2))])
    optimizer = keras_adafisher.AdaFisher(
        learning_rate=0.5, damping=0.25, gamma_1=0.5, gamma_2=0.5, **PLAIN
    )
    model.compile(optimizer, loss=product_loss)
    # One example: h = (1, 2), and s = y_true / 2 = (1, 3).
    model.train_on_batch(np.array([[1.0, 2.0]]), np.array([[2.0, 6.0]]))
    # h² = (1, 4) and s² = (1, 9) normalize to (0, 1), the factors are
    # 0.5 * 1 + 0.5 * (0, 1) = (0.5, 1), and F = H S + 0.25.
    fisher = [[0.5, 0.75], [0.75, 1.25]]
    np.testing.assert_allclose(
        to_numpy(optimizer.preconditioner(layer.kernel)), fisher, rtol=1e-6
    )
    # The gradient is h s, the bias-corrected momentum of step one as well.
    expected = -0.5 * np.array([[1.0, 3.0], [2.0, 6.0]]) / fisher
    np.testing.assert_allclose(layer.get_weights()[0], expected, rtol=1e-6)


def test_the_first_step_by_hand_with_the_default_rule():
    layer = keras.layers.Dense(2, use_bias=False)
    model = keras.Sequential([keras.Input((2,)), layer])
    layer.set_weights([np.zeros((2, 2))])
    optimizer = keras_adafisher.AdaFisher(
        learning_rate=0.5, damping=1.0, gamma_1=1 / 3, gamma_2=1 / 3
    )
    model.compile(optimizer, loss=product_loss)
    # h = (1, 2) and s = (1, 3). h² = (1, 4) and s² = (1, 9), divided by their
    # means 2.5 and 5: (0.4, 1.6) and (0.2, 1.8).
    model.train_on_batch(np.array([[1.0, 2.0]]), np.array([[2.0, 6.0]]))
    # The factors are 2/3 + 1/3 of that: (0.8, 1.2) and (11/15, 19/15).
    fisher = np.outer([0.8, 1.2], [11 / 15, 19 / 15]) + 1
    np.testing.assert_allclose(
        to_numpy(optimizer.preconditioner(layer.kernel)), fisher, rtol=1e-6
    )
    # After one step momentum is the gradient, with or without Nesterov's, and
    # the running mean square is that of the step: it has an RMS of 1. The
    # largest entry, 1.55, is bounded.
    gradient = np.array([[1.0, 3.0], [2.0, 6.0]])
    rms = np.sqrt(np.mean((gradient / fisher) ** 2))
    expected = -0.5 * gradient / fisher / rms
    assert expected[1, 1] < -0.7
    expected[1, 1] = -0.5
    # `1 - 0.99` has five digits in single precision, as in Adam.
    np.testing.assert_allclose(layer.get_weights()[0], expected, rtol=1e-5)
    # Nesterov's momentum is 0.19 times the gradient.
    np.testing.assert_allclose(
        to_numpy(optimizer.effective_learning_rate(layer.kernel)),
        -expected / (0.19 * gradient),
        rtol=1e-5,
    )


@pytest.mark.parametrize("step", [0, 5, 10, 11])
def test_no_entry_moves_by_more_than_the_learning_rate(step):
    """Whether the gradient that is too large is measured (0, 10) or not."""
    model = mlp()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher(1e-2, factor_update_steps=5)
    optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    for now in range(step + 1):
        scale = 1e6 if now == step else 1.0
        grads = [
            ops.convert_to_tensor(
                (scale * rng.normal(size=w.shape)).astype("float32")
            )
            for w in model.weights
        ]
        before = weights(model)
        optimizer.apply(grads, model.weights)
    moved = np.concatenate(
        [
            np.abs(new - old).ravel()
            for new, old in zip(weights(model), before, strict=True)
        ]
    )
    assert 0.001 < moved.max() < 0.01 * (1 + 1e-4)


@pytest.mark.parametrize("rms_decay", [0.99, None])
@pytest.mark.parametrize("kind", ["number", "accumulates"])
def test_the_effective_learning_rate_is_what_moved(rms_decay, kind):
    """At each step, and for entries that the learning rate bounds too."""
    accumulated = 2 if kind == "accumulates" else 1
    model = mlp()
    optimizer = keras_adafisher.AdaFisher(
        1e-2,
        rms_decay=rms_decay,
        nesterov=False,
        factor_update_steps=2,
        gradient_accumulation_steps=accumulated if accumulated > 1 else None,
    )
    model.compile(optimizer, loss=cross_entropy())
    optimizer.build(model.trainable_variables)
    kernel = model.layers[0].kernel
    rate = to_numpy(optimizer.effective_learning_rate(kernel))
    np.testing.assert_array_equal(rate, np.zeros((6, 5)))
    bounded = 0
    for _ in range(5):
        before = to_numpy(kernel)
        for _ in range(accumulated):
            model.train_on_batch(*data())
        moved = before - to_numpy(kernel)
        momentum = to_numpy(
            next(v for v in optimizer.variables if "momentum" in v.name)
        )
        rate = to_numpy(optimizer.effective_learning_rate(kernel))
        np.testing.assert_allclose(rate * momentum, moved, atol=2e-7)
        bounded += np.sum(np.isclose(np.abs(moved), 1e-2, rtol=1e-4))
    assert (bounded > 0) == (rms_decay is not None)


def test_the_scale_of_the_loss_makes_no_difference():
    """With the default rule, as with Adam."""
    x, y = data()

    def run(scale):
        keras.utils.set_random_seed(0)
        model = mlp()
        loss = cross_entropy()
        model.compile(
            keras_adafisher.AdaFisher(factor_update_steps=2, adam_epsilon=0.0),
            loss=lambda y, z: scale * loss(y, z),
        )
        model.fit(x, y, batch_size=16, shuffle=False, epochs=2, verbose=0)
        return weights(model)

    assert_close(run(1024.0), run(1.0), 1e-6)


def test_a_parameter_without_any_gradient_stays():
    """Its running mean square is zero."""
    model = mlp()
    before = weights(model)
    model.compile(keras_adafisher.AdaFisher(), loss=product_loss)
    model.train_on_batch(np.ones((4, 6)), np.zeros((4, 3)))
    assert_same(weights(model), before)


def test_the_order_of_the_trainable_variables_does_not_matter():
    model = mlp()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher()
    optimizer.build(model.trainable_variables[::-1])
    assert to_numpy(optimizer.preconditioner(model.layers[0].kernel)).shape == (
        6,
        5,
    )


def test_parameters_without_factors_take_the_rule_of_adamw():
    """Compared with Keras' own AdamW on the same embedding."""
    ids = np.array([[0, 1], [2, 1], [3, 3], [1, 0]])
    y = np.random.default_rng(0).normal(size=(4, 2)).astype("float32")

    class Table(keras.layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(5, 3), name="table")

        def call(self, ids):
            return ops.mean(ops.take(self.table, ids, axis=0), axis=1)

    def run(make_optimizer):
        keras.utils.set_random_seed(0)
        table, frozen = Table(), keras.layers.Dense(2)
        model = keras.Sequential(
            [keras.Input((2,), dtype="int32"), table, frozen]
        )
        optimizer = make_optimizer()
        model.compile(optimizer, loss="mse")
        dense = frozen.get_weights()
        for _ in range(6):
            model.train_on_batch(ids, y)
            frozen.set_weights(dense)
        return weights(table)

    ours = run(
        lambda: keras_adafisher.AdaFisher(
            1e-2,
            beta=0.8,
            nesterov=False,
            weight_decay=0.1,
            adam_beta_2=0.99,
            adam_epsilon=1e-5,
        )
    )
    adamw = run(
        lambda: keras.optimizers.AdamW(
            1e-2, beta_1=0.8, beta_2=0.99, weight_decay=0.1, epsilon=1e-5
        )
    )
    assert_close(ours, adamw, 1e-6)


def test_adafisherw_is_adafisher_with_weight_decay():
    x, y = data()

    def run(optimizer):
        keras.utils.set_random_seed(0)
        model = mlp()
        model.compile(optimizer, loss=cross_entropy())
        model.fit(x, y, batch_size=16, verbose=0)
        return weights(model)

    assert_same(
        run(keras_adafisher.AdaFisherW()),
        run(keras_adafisher.AdaFisher(weight_decay=0.1)),
    )


def test_weight_decay_leaves_out_what_is_excluded():
    x, y = data()
    model = mlp()
    optimizer = keras_adafisher.AdaFisherW(learning_rate=0.0, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer, loss=cross_entropy())
    model.set_weights([np.ones(w.shape) for w in model.get_weights()])
    model.train_on_batch(x, y)
    assert_same(weights(model), [np.ones(w.shape) for w in model.weights])


def test_no_momentum_is_kept_for_a_probe_and_no_second_one_anywhere():
    """State: one slot per parameter, two small vectors per layer.

    And one number per parameter, the mean square of its steps.
    """
    model = mlp()
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    model.optimizer.build(model.trainable_variables)
    parameters = model.count_params()
    # Dense 6-5-3: H, S and the factor of the bias' input.
    factors = (6 + 5 + 1) + (5 + 3 + 1)
    # How often each was taken in, and dropped.
    records = 2 * 2
    iteration_and_rate = 2
    total = sum(int(np.prod(v.shape)) for v in model.optimizer.variables)
    mean_squares = 4
    others = records + mean_squares + iteration_and_rate
    assert total == parameters + factors + others


@pytest.mark.parametrize(
    "clip", [{"clipnorm": 1e-3}, {"clipvalue": 1e-4}, {"global_clipnorm": 1e-3}]
)
def test_clipping_does_not_see_the_probes(clip, rng):
    """The factors are those without clipping, the step is the clipped one."""
    x, r = 10 * rng.normal(size=(2, 5, 3)).astype("float32")

    def run(**arguments):
        layer = keras.layers.Dense(3)
        model = keras.Sequential([keras.Input((3,)), layer])
        layer.set_weights([np.zeros((3, 3)), np.zeros(3)])
        optimizer = keras_adafisher.AdaFisher(1e-3, 0.0, **PLAIN, **arguments)
        model.compile(optimizer, loss=product_loss)
        model.train_on_batch(x, r)
        fisher = [to_numpy(optimizer.preconditioner(v)) for v in layer.weights]
        return fisher, weights(layer)

    plain_fisher, plain = run()
    fisher, clipped = run(**clip)
    assert_same(fisher, plain_fisher)
    # step * fisher / rate is the gradient that was used.
    gradients = [-w * f / 1e-3 for w, f in zip(plain, fisher, strict=True)]
    used = [-w * f / 1e-3 for w, f in zip(clipped, fisher, strict=True)]
    if "clipvalue" in clip:
        expected = [np.clip(g, -1e-4, 1e-4) for g in gradients]
    elif "clipnorm" in clip:
        expected = [g * 1e-3 / np.linalg.norm(g) for g in gradients]
    else:
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients))
        expected = [g * 1e-3 / norm for g in gradients]
    assert_close(used, expected, 1e-5)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_accumulated_gradients_are_those_of_the_larger_batch(steps, epsilon):
    x, y = data(examples=24)
    arguments = {"factor_update_steps": 2, "epsilon": epsilon}

    def run(batch_size, **more):
        keras.utils.set_random_seed(0)
        model = mlp()
        optimizer = keras_adafisher.AdaFisher(**arguments, **more)
        model.compile(optimizer, loss=cross_entropy())
        model.fit(
            x, y, batch_size=batch_size, epochs=3, shuffle=False, verbose=0
        )
        fisher = [to_numpy(optimizer.preconditioner(v)) for v in model.weights]
        return weights(model), fisher

    expected, expected_fisher = run(12)
    actual, fisher = run(12 // steps, gradient_accumulation_steps=steps)
    assert_close(actual, expected, 1e-6)
    assert_close(fisher, expected_fisher, 1e-6)


def test_an_update_takes_in_a_layer_that_its_last_step_did_not_use(rng):
    """And the next update starts from zero."""

    class Sometimes(keras.Model):
        def __init__(self):
            super().__init__()
            self.used = keras.layers.Dense(3)
            self.always = keras.layers.Dense(3)
            self.skip = False

        def call(self, x):
            z = self.always(x)
            return z if self.skip else z + self.used(x)

    x, r = rng.normal(size=(2, 4, 5, 3)).astype("float32")
    model = Sometimes()
    model.build((None, 3))
    optimizer = keras_adafisher.AdaFisher(
        damping=0.01,
        gamma_1=0.9,
        gamma_2=0.1,
        factor_update_steps=1,
        gradient_accumulation_steps=2,
        **PLAIN,
    )
    model.compile(optimizer, loss=product_loss, run_eagerly=True)
    expected = reference.LinearFactors(3, 3, bias=True)
    for update in range(2):
        for step in range(2):
            model.skip = step == 1
            model.train_on_batch(x[2 * update + step], r[2 * update + step])
        # Only the first step of each update has used the layer.
        s = r[2 * update] / r[2 * update].size
        expected.update(x[2 * update], s, 0.9, 0.1)
        kernel, bias = expected.fisher(0.01)
        for variable, fisher in (
            (model.used.kernel, kernel),
            (model.used.bias, bias),
        ):
            np.testing.assert_allclose(
                to_numpy(optimizer.preconditioner(variable)), fisher, rtol=1e-5
            )


def test_a_fixed_loss_scale_changes_nothing():
    x, y = data()

    def run(**arguments):
        keras.utils.set_random_seed(0)
        model = mlp()
        optimizer = keras_adafisher.AdaFisher(epsilon=1e-6, **arguments)
        model.compile(optimizer, loss=cross_entropy())
        model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
        return weights(model)

    assert_close(run(loss_scale_factor=64.0), run(), 1e-6)


def test_a_step_that_the_loss_scale_optimizer_skips_changes_nothing():
    x, y = data()
    model = mlp()
    inner = keras_adafisher.AdaFisher(factor_update_steps=2)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    model.compile(optimizer, loss=cross_entropy())

    def fisher():
        return [to_numpy(inner.preconditioner(v)) for v in model.weights]

    for _ in range(2):
        model.train_on_batch(x, y)
    before = weights(model), fisher()
    # Step 2 would measure. It isn't lost.
    model.train_on_batch(np.full_like(x, np.inf), y)
    assert int(to_numpy(inner.iterations)) == 2
    assert_same(weights(model), before[0])
    assert_same(fisher(), before[1])
    model.train_on_batch(x, y)
    assert int(to_numpy(inner.iterations)) == 3
    assert not np.allclose(fisher()[0], before[1][0])


@pytest.mark.parametrize("overwrite", [None, 2])
def test_exponential_moving_averages(overwrite):
    x, y = data()
    model = mlp()
    optimizer = keras_adafisher.AdaFisher(
        factor_update_steps=2,
        use_ema=True,
        ema_momentum=0.5,
        ema_overwrite_frequency=overwrite,
    )
    model.compile(optimizer, loss=cross_entropy())
    trajectory = []
    average = None
    for t in range(5):
        model.train_on_batch(x, y)
        trajectory.append(weights(model))
        if overwrite is None:
            average = (
                trajectory[0]
                if t == 0
                else [
                    0.5 * a + 0.5 * w
                    for a, w in zip(average, trajectory[-1], strict=True)
                ]
            )
    assert len({w[0].tobytes() for w in trajectory}) == 5
    if overwrite is None:
        optimizer.finalize_variable_values(model.trainable_variables)
        assert_close(weights(model), average, 1e-5)


def averages_of(optimizer):
    return [
        to_numpy(average)
        for average in optimizer._model_variables_moving_average
    ]


@pytest.mark.parametrize("accumulated", [None, 2])
def test_averages_over_a_tenth_of_the_steps_so_far(accumulated):
    """With 10 steps more, weights count `10 / (n + 10)`, n being the steps."""
    x, y = data()
    model = mlp()
    optimizer = keras_adafisher.AdaFisherMuon(
        use_ema=True,
        ema_momentum="auto",
        gradient_accumulation_steps=accumulated,
    )
    model.compile(optimizer, loss=cross_entropy())
    steps = 14
    expected = 0
    for step in range(steps):
        model.train_on_batch(x, y)
        later = [n / (n + 10) for n in range(step + 1, steps)]
        share = 10 / (step + 10) * np.prod(later)
        expected = expected + share * np.concatenate(
            [w.ravel() for w in weights(model)]
        )
    found = averages_of(optimizer)
    assert_close(np.concatenate([a.ravel() for a in found]), expected, 1e-5)
    assert not np.allclose(found[0], weights(model)[0], rtol=1e-3)
    optimizer.finalize_variable_values(model.trainable_variables)
    assert_same(weights(model), found)


@pytest.mark.parametrize(
    ("accumulated", "are_the_weights"),
    # The first weights of three steps take the place of the averages, and after
    # the third step the averages take that of the weights. With accumulation,
    # weights move at every second batch, and Keras overwrites them at both
    # batches of the third update.
    [(None, [1, 0, 1, 1, 0, 1, 1]), (2, [1, 0, 0, 0, 1, 1, 1, 0, 0])],
)
def test_averages_begin_anew_when_weights_are_overwritten(
    accumulated, are_the_weights
):
    x, y = data()
    model = mlp()
    optimizer = keras_adafisher.AdaFisher(
        use_ema=True,
        ema_momentum="auto",
        ema_overwrite_frequency=3,
        gradient_accumulation_steps=accumulated,
    )
    model.compile(optimizer, loss=cross_entropy())
    found = []
    for _ in are_the_weights:
        model.train_on_batch(x, y)
        average, weight = averages_of(optimizer)[0], weights(model)[0]
        found.append(np.allclose(average, weight, rtol=1e-6))
    assert found == are_the_weights


class Stop(keras.callbacks.Callback):
    """Ends a training as Ctrl-C does."""

    def on_epoch_end(self, epoch, logs=None):
        raise KeyboardInterrupt


def test_a_model_with_averaged_weights_is_used_after_an_interruption(tmp_path):
    x, y = data()
    model = mlp()
    optimizer = keras_adafisher.AdaFisherMuon(use_ema=True, ema_momentum=0.5)
    model.compile(optimizer, loss=cross_entropy())
    try:
        model.fit(x, y, callbacks=[Stop()], verbose=0)
    except KeyboardInterrupt:
        # What is trained here is trained while an error is handled.
        model.evaluate(x, y, verbose=0)
        model.fit(x, y, verbose=0)
    model.evaluate(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    model.fit(x, y, verbose=0)
    assert all(np.isfinite(w).all() for w in weights(model))


@pytest.mark.parametrize(
    ("swaps", "momentum"), [(False, 0.5), (True, 0.5), (False, "auto")]
)
def test_a_model_with_averaged_weights_is_used_and_trained_on(
    swaps, momentum, tmp_path
):
    """On JAX, Keras' own optimizers leave arrays that two variables share."""
    x, y = data()
    model = mlp()
    optimizer = keras_adafisher.AdaFisherMuon(
        use_ema=True, ema_momentum=momentum
    )
    model.compile(optimizer, loss=cross_entropy())
    fit = {"batch_size": 12, "shuffle": False, "verbose": 0}

    def callbacks():
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        return [swap] if swaps else []

    model.fit(x, y, callbacks=callbacks(), **fit)
    averages = weights(model)
    loss = model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(weights(loaded), averages)
    assert loaded.evaluate(x, y, verbose=0) == loss
    # What comes next begins with the averages.
    model.fit(x, y, callbacks=callbacks(), **fit)
    loaded.fit(x, y, callbacks=callbacks(), **fit)
    assert_same(weights(model), weights(loaded))
    assert not np.allclose(weights(model)[0], averages[0])
    model.train_on_batch(x, y)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_with_nan_or_inf_leaves_the_factors_alone(bad):
    x, y = image_data(examples=16)
    model = cnn()
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=1)
    model.compile(optimizer, loss=cross_entropy())
    parameters = [w for w in model.weights if w.trainable]
    model.train_on_batch(x, y)
    before = [to_numpy(optimizer.preconditioner(v)) for v in parameters]
    start = model.get_weights()

    # In the loss, and so in every gradient.
    model.train_on_batch(x, y, sample_weight=np.array([bad] + 15 * [1.0]))
    after = [to_numpy(optimizer.preconditioner(v)) for v in parameters]
    assert_same(after, before)

    # In the first layer's input. Some of TensorFlow's kernels for the CPU make
    # `relu(nan)` 0, so later layers may see finite numbers.
    model.set_weights(start)
    x[0, 0, 0, 0] = bad
    model.train_on_batch(x, y)
    after = [to_numpy(optimizer.preconditioner(v)) for v in parameters]
    assert_same(after[:2], before[:2])


def test_a_batch_of_weight_zero_is_no_measurement():
    """Nothing in it depends on the layers. Factors would shrink to zeros."""
    x, y = image_data()
    model = cnn()
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=1)
    model.compile(optimizer, loss=cross_entropy())
    model.train_on_batch(x, y)
    kernels = [v for v in optimizer.factored_variables if len(v.shape) > 1]
    assert len(kernels) == 2

    def factors():
        return [
            to_numpy(factor)
            for kernel in kernels
            for factor in (
                optimizer.factors(kernel).activation,
                optimizer.factors(kernel).gradient,
            )
        ]

    before = factors()
    np.testing.assert_allclose([f.mean() for f in before], 1, rtol=1e-5)
    for _ in range(3):
        model.train_on_batch(x, y, sample_weight=np.zeros(len(x), "float32"))
    assert_same(factors(), before)
    (probe, *_) = keras_adafisher.probe.probes_at(kernels[0])
    assert optimizer.records_of(probe) == (1, 0, False)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="JAX and PyTorch look at what is computed, not at constants",
)
def test_tensorflow_may_look_for_numbers_that_are_not_finite():
    import tensorflow as tf

    x, y = data()
    inputs = keras.Input((6,))
    used = keras.layers.Dense(3)(inputs)
    # Of the other output no gradient comes.
    model = keras.Model(inputs, [used, keras.layers.Dense(2)(inputs)])
    model.compile(keras_adafisher.AdaFisher(), loss=[cross_entropy(), None])
    tf.debugging.enable_check_numerics()
    try:
        loss = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    finally:
        tf.debugging.disable_check_numerics()
    assert loss[-1] < loss[0]


def test_an_empty_batch_and_a_batch_of_zeros(rng):
    model, layer, _ = linear(rng)
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=1)
    model.compile(optimizer, loss=product_loss)
    model.train_on_batch(np.zeros((5, 4)), np.zeros((5, 3)))
    fisher = to_numpy(optimizer.preconditioner(layer.kernel))
    assert np.all(np.isfinite(fisher))
    assert np.all(fisher >= optimizer.damping)
    assert all(np.all(np.isfinite(w)) for w in layer.get_weights())


def test_learning_rate_schedules_and_assignment():
    x, y = data()
    model = mlp()
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [1], [1e-3, 0.0]
    )
    model.compile(keras_adafisher.AdaFisher(schedule), loss=cross_entropy())
    start = weights(model)
    model.train_on_batch(x, y)
    model.train_on_batch(x, y)
    moved = weights(model)
    assert not np.array_equal(moved[0], start[0])
    model.train_on_batch(x, y)
    assert_same(weights(model), moved)

    model.compile(keras_adafisher.AdaFisher(1e-3), loss=cross_entropy())
    model.optimizer.learning_rate = 0.0
    model.train_on_batch(x, y)
    assert_same(weights(model), moved)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_half_precision_take_steps_as_large(dtype):
    """With small gradients: a learning rate over their root has no room."""
    moves = []
    for each in ("float32", dtype):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(3, dtype=each)]
        )
        model.compile(keras_adafisher.AdaFisher(1e-2), loss=product_loss)
        before = weights(model)
        for step in range(3):
            rng = np.random.default_rng(step)
            x = rng.normal(size=(8, 4)).astype("float32")
            y = 1e-3 * rng.normal(size=(8, 3)).astype("float32")
            model.train_on_batch(x, y)
        after = weights(model)
        assert str(after[0].dtype) == each
        moves.append(
            [
                np.asarray(to_numpy(a), "float64")
                - np.asarray(to_numpy(b), "float64")
                for a, b in zip(after, before, strict=True)
            ]
        )
    for expected, actual in zip(*moves, strict=True):
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert error < {"bfloat16": 0.2, "float16": 0.05}[dtype]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    x, y = data()
    keras.config.set_dtype_policy(policy)
    try:
        model = mlp()
        model.compile(
            keras_adafisher.AdaFisher(factor_update_steps=2),
            loss=cross_entropy(),
        )
    finally:
        keras.config.set_dtype_policy("float32")
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    optimizer = model.optimizer.inner_optimizer if scaled else model.optimizer
    history = model.fit(x, y, batch_size=16, epochs=8, verbose=0)
    assert all(v.dtype == "float32" for v in model.trainable_variables)
    # Has been measured: all factors start at 1.
    assert np.ptp(to_numpy(optimizer.preconditioner(model.weights[0]))) > 0.1
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


def test_the_same_seed_gives_the_same_weights():
    x, y = image_data()

    def run():
        keras.utils.set_random_seed(7)
        model = cnn()
        model.compile(
            keras_adafisher.AdaFisher(factor_update_steps=2),
            loss=cross_entropy(),
        )
        model.fit(x, y, batch_size=16, epochs=2, verbose=0)
        return weights(model)

    assert_same(run(), run())


def test_config_round_trip():
    optimizer = keras_adafisher.AdaFisher(
        learning_rate=keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.9),
        beta=0.8,
        damping=0.5,
        gamma_1=0.3,
        gamma_2=0.4,
        factor_update_steps=7,
        epsilon=1e-6,
        adam_beta_2=0.9,
        adam_epsilon=1e-5,
        weight_decay=0.1,
        global_clipnorm=1.0,
        use_ema=True,
        ema_momentum=0.9,
        ema_overwrite_frequency=3,
        gradient_accumulation_steps=2,
        name="second_order",
    )
    config = keras.optimizers.serialize(optimizer)
    assert config["registered_name"] == "keras_adafisher>AdaFisher"
    copy = keras.optimizers.deserialize(config)
    assert copy.get_config() == optimizer.get_config()
    for name, value in copy.get_config().items():
        if name != "learning_rate":
            assert getattr(copy, name) == value


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("adafisher", keras_adafisher.AdaFisher),
        ("AdaFisher", keras_adafisher.AdaFisher),
        ("adafisherw", keras_adafisher.AdaFisherW),
    ],
)
def test_optimizers_are_found_by_name(name, cls):
    assert type(keras.optimizers.get(name)) is cls


def test_defaults():
    config = keras_adafisher.AdaFisher().get_config()
    defaults = {
        "beta": 0.9,
        "damping": 1.0,
        "gamma_1": 0.2,
        "gamma_2": 0.2,
        "factor_update_steps": 10,
        "epsilon": 0.0,
        "normalization": "mean",
        "nesterov": True,
        "rms_decay": 0.99,
        "weight_decay": None,
    }
    assert {name: config[name] for name in defaults} == defaults
    np.testing.assert_allclose(config["learning_rate"], 3e-3)
    assert keras_adafisher.AdaFisherW().weight_decay == 0.1


WRONG = [
    ("learning_rate", [-1e-3, float("nan")], "must be a float >= 0"),
    ("beta", [-0.1, 1.0, "0.9", None, True], r"must be a float in the range"),
    ("gamma_1", [-0.1, 1.0, 1.5, None], r"must be a float in the range"),
    ("gamma_2", [-0.1, 1.0, "a", None], r"must be a float in the range"),
    ("rms_decay", [-0.1, 1.0, "0.9", True], r"must be a float in the range"),
    ("normalization", ["max", None, True], '"mean" or "min_max"'),
    ("nesterov", [1, None, "yes"], "must be a boolean"),
    ("adam_beta_2", [-0.1, 1.0], r"must be a float in the range"),
    ("damping", [0.0, -1.0, None, float("inf")], "must be a float > 0"),
    ("epsilon", [-1e-9, None, "1e-6"], "must be a float >= 0"),
    ("adam_epsilon", [-1e-9], "must be a float >= 0"),
    ("factor_update_steps", [0, -1, 2.5, 1.0, None, True], "an integer >= 1"),
]


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        (argument, value, allowed)
        for argument, values, allowed in WRONG
        for value in values
    ],
)
def test_arguments_out_of_range(argument, value, allowed):
    message = (
        f"Argument `{argument}` .*{allowed}.* Received: {argument}={value}"
    )
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        keras_adafisher.AdaFisher(**{argument: value})


def test_what_keras_checks_itself():
    with pytest.raises(ValueError, match="`learning_rate` should be float"):
        keras_adafisher.AdaFisher("fast")
    with pytest.raises(ValueError, match="Only one of `clipnorm`"):
        keras_adafisher.AdaFisher(clipnorm=1.0, clipvalue=1.0)
    with pytest.raises(ValueError, match="not recognized"):
        keras_adafisher.AdaFisher(momentum=0.9)
    with pytest.raises(ValueError, match="`weight_decay` must be a float"):
        keras_adafisher.AdaFisherW(weight_decay=None)


def test_variables_of_a_model_that_is_not_wrapped_come_with_a_warning():
    model = mlp()
    wrap_it = r"call `keras_adafisher.wrap\(model\)` first"
    with pytest.warns(UserWarning, match=wrap_it):
        keras_adafisher.AdaFisher().build(model.trainable_variables)
    keras_adafisher.wrap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_adafisher.AdaFisher().build(model.weights)
        keras_adafisher.AdaFisher().build(model.trainable_variables)


def test_a_model_in_which_nothing_can_be_factored_trains_by_adamw():
    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), name="scale")

        def call(self, x):
            return x * self.scale

    def train(optimizer):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), Scale()])
        model.compile(optimizer, loss="mse")
        model.fit(np.ones((4, 4)), np.ones((4, 4)), epochs=3, verbose=0)
        return weights(model)

    with pytest.warns(UserWarning, match="none of the 1 variables"):
        actual = train(
            keras_adafisher.AdaFisher(1e-3, weight_decay=0.1, nesterov=False)
        )
    expected = train(keras.optimizers.AdamW(1e-3, weight_decay=0.1))
    assert_close(actual, expected, 1e-6)


def test_fisher_diagonal_of_a_variable_without_one():
    model = mlp()
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    optimizer = model.optimizer
    kernel = model.layers[0].kernel
    with pytest.raises(ValueError, match="has no Kronecker factors yet"):
        optimizer.preconditioner(kernel)
    optimizer.build(model.trainable_variables)
    optimizer.preconditioner(kernel)
    for wrong in (mlp().layers[0].kernel, optimizer.iterations):
        with pytest.raises(ValueError, match="Argument `variable` must be"):
            optimizer.preconditioner(wrong)


@pytest.mark.parametrize("interval, warns", [(10, True), (9, False)])
def test_lists_that_take_turns(interval, warns):
    """With an even interval, one of two would never be measured."""
    model = mlp()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=interval)
    optimizer.build(model.trainable_variables)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        # All, as with two losses, and then one by one.
        for layers in (model.layers, *([layer] for layer in model.layers)) * 2:
            variables = [v for a in layers for v in a.trainable_variables]
            optimizer.apply([ops.ones(v.shape) for v in variables], variables)
    text = f"applied to 2 lists .* `factor_update_steps={interval}`"
    found = [w for w in seen if re.search(text, str(w.message))]
    assert len(found) == warns


def test_errors_of_apply_are_keras_own():
    model = mlp()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher()
    with pytest.raises(ValueError, match="must already be built"):
        optimizer.apply([ops.zeros(())])
    optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="gradients must match"):
        optimizer.apply([ops.zeros(())])
    stranger = keras.Variable(np.zeros(3, "float32"))
    before = [np.array(to_numpy(v)) for v in optimizer.variables]
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply(
            [ops.ones(v.shape) for v in (*model.trainable_variables, stranger)],
            [*model.trainable_variables, stranger],
        )
    for old, variable in zip(before, optimizer.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), old)
    optimizer.apply([])


def test_steps_that_do_not_measure_keep_the_factors():
    x, y = data()
    model = mlp()
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=3)
    model.compile(optimizer, loss=cross_entropy())
    seen = []
    for _ in range(7):
        model.train_on_batch(x, y)
        seen.append(to_numpy(optimizer.preconditioner(model.layers[0].kernel)))
    changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changed == [False, False, True, False, False, True]
