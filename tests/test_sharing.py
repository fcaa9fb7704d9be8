"""Layers that several calls, models or optimizers share.

Most tests train with a learning rate of 0: the weights stay, so what one
optimizer measures must be what it measures where it is the only one.
"""

import keras
import numpy as np
import pytest
from keras import ops
from layer_cases import JIT_COMPILE
from models import assert_close
from models import probes_in
from models import product_loss
from models import to_numpy

import keras_adafisher

MEASURING = {"learning_rate": 0.0, "gamma_1": 0.4, "gamma_2": 0.3}


def fishers(optimizer, model):
    return [to_numpy(optimizer.preconditioner(v)) for v in model.weights]


def mlp(name, *sizes):
    first, *others = sizes
    layers = [keras.layers.Dense(n, activation="tanh") for n in others]
    return keras.Sequential([keras.Input((first,)), *layers], name=name)


@pytest.mark.parametrize(
    "rule",
    [
        {},
        # So that the scale of what is measured matters.
        {"normalization": "min_max", "epsilon": 0.1},
    ],
    ids=["default", "epsilon"],
)
def test_a_siamese_model_trains_as_its_tower_on_both_inputs(rule, rng):
    tower = mlp("tower", 4, 3, 2)
    x = rng.normal(size=(12, 2, 4)).astype("float32")
    r = rng.normal(size=(12, 2, 2)).astype("float32")
    start = tower.get_weights()

    def train(model, x, r, batch_size):
        tower.set_weights(start)
        optimizer = keras_adafisher.AdaFisher(factor_update_steps=2, **rule)
        model.compile(optimizer, loss=product_loss, jit_compile=JIT_COMPILE)
        model.fit(
            x, r, batch_size=batch_size, epochs=2, shuffle=False, verbose=0
        )
        return tower.get_weights() + fishers(optimizer, tower)

    expected = train(tower, x.reshape(24, 4), r.reshape(24, 2), 8)
    left, right = keras.Input((4,)), keras.Input((4,))
    both = keras.layers.Concatenate()([tower(left), tower(right)])
    siamese = keras.Model([left, right], both)
    actual = train(siamese, [x[:, 0], x[:, 1]], r.reshape(12, 4), 4)
    assert_close(actual, expected, 1e-6)
    assert not np.allclose(actual[0], start[0])


class Pair:
    """Two models with a trunk in common, and an optimizer for each."""

    def __init__(self):
        keras.utils.set_random_seed(3)
        trunk = mlp("trunk", 4, 3)
        self.models = {
            name: keras.Sequential([trunk, keras.layers.Dense(2, name=name)])
            for name in "AB"
        }
        self.optimizers = {}
        self.steps = dict.fromkeys("AB", 0)

    def train(self, order):
        for name in order:
            model = self.models[name]
            if name not in self.optimizers:
                self.optimizers[name] = keras_adafisher.AdaFisher(
                    factor_update_steps={"A": 3, "B": 2}[name], **MEASURING
                )
                model.compile(self.optimizers[name], loss=product_loss)
            rng = np.random.default_rng((self.steps[name], ord(name)))
            self.steps[name] += 1
            x = rng.normal(size=(5, 4)).astype("float32")
            r = rng.normal(size=(5, 2)).astype("float32")
            model.fit(x, r, verbose=0)

    def fishers(self, name):
        return fishers(self.optimizers[name], self.models[name])


def trained_alone(order):
    pair = Pair()
    pair.train(order)
    return pair.fishers(order[0])


def test_each_of_two_optimizers_measures_as_if_it_were_alone():
    """Neither takes the other's measurements, or turns its requests off."""
    pair = Pair()
    # Each measuring step of one comes right after a step of the other that
    # asks for nothing, and the second model is compiled after the first has
    # trained.
    order = "AABABBABBABAAAB"
    pair.train(order)
    for name in "AB":
        alone = trained_alone([n for n in order if n == name])
        assert_close(pair.fishers(name), alone, 1e-6)


@pytest.mark.parametrize("first", "AB")
def test_compiling_one_model_with_another_optimizer_leaves_the_other(first):
    pair = Pair()
    second = "AB".replace(first, "")
    pair.train([second, first])
    model = pair.models[first]
    model.compile(keras.optimizers.SGD(0.0), loss=product_loss)
    pair.train([first, *[second] * 4, first])
    assert_close(pair.fishers(second), trained_alone([second] * 5), 1e-6)

    # Of the head that it has for itself, nothing is left wrapped.
    assert probes_in(model.layers[-1]) == []
    pair.models[second].compile(keras.optimizers.SGD(0.0), loss=product_loss)
    for each in pair.models.values():
        assert probes_in(each) == []


class GAN:
    """Two networks, two optimizers, one step as in Keras' guides."""

    def __init__(self):
        self.generator = mlp("generator", 3, 4)
        self.discriminator = mlp("discriminator", 4, 3, 2)
        keras_adafisher.wrap(self.generator)
        keras_adafisher.wrap(self.discriminator)
        self.g_optimizer = keras_adafisher.AdaFisher(
            factor_update_steps=2, **MEASURING
        )
        self.d_optimizer = keras_adafisher.AdaFisher(
            factor_update_steps=3, **MEASURING
        )
        self.g_optimizer.build(self.generator.trainable_variables)
        self.d_optimizer.build(self.discriminator.trainable_variables)

    @property
    def training_step(self):
        return keras_adafisher.training_step(self.g_optimizer, self.d_optimizer)

    def d_loss(self, real, fake, r):
        x = ops.concatenate([real, fake])
        return ops.mean(self.discriminator(x, training=True) * r)

    def g_loss(self, z, r):
        fake = self.generator(z, training=True)
        return ops.mean(self.discriminator(fake) * r)


class GANWithTape(GAN):
    def train(self, batches):
        import tensorflow as tf

        step = tf.function(self.training_step(self.step))
        for batch in batches:
            step(*map(tf.constant, batch))

    def step(self, z, real, d_r, g_r):
        import tensorflow as tf

        fake = self.generator(z)
        with tf.GradientTape() as tape:
            loss = self.d_loss(real, fake, d_r)
        variables = self.discriminator.trainable_weights
        self.d_optimizer.apply(tape.gradient(loss, variables), variables)
        with tf.GradientTape() as tape:
            loss = self.g_loss(z, g_r)
        variables = self.generator.trainable_weights
        self.g_optimizer.apply(tape.gradient(loss, variables), variables)


class GANWithBackward(GAN, keras.Model):
    def __init__(self):
        keras.Model.__init__(self)
        GAN.__init__(self)

    def train(self, batches):
        import torch

        for batch in batches:
            self.step(*map(torch.from_numpy, batch))

    def step(self, z, real, d_r, g_r):
        import torch

        self.zero_grad()
        fake = self.generator(z).detach()
        self.d_loss(real, fake, d_r).backward()
        variables = self.discriminator.trainable_weights
        gradients = [v.value.grad for v in variables]
        with torch.no_grad():
            self.d_optimizer.apply(gradients, variables)
        # The discriminator's probes answer too, and keep what they answer.
        self.zero_grad()
        self.g_loss(z, g_r).backward()
        variables = self.generator.trainable_weights
        gradients = [v.value.grad for v in variables]
        with torch.no_grad():
            self.g_optimizer.apply(gradients, variables)


class StatelessGAN(GAN):
    def train(self, batches):
        import jax

        lists = (
            self.generator.trainable_variables,
            self.discriminator.trainable_variables,
            self.g_optimizer.variables,
            self.d_optimizer.variables,
        )
        state = [[v.value for v in variables] for variables in lists]
        step = jax.jit(self.training_step(self.step))
        for batch in batches:
            state = step(state, *batch)
        for variables, values in zip(lists, state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    def step(self, state, z, real, d_r, g_r):
        import jax

        g, d, g_state, d_state = state
        fake, _ = self.generator.stateless_call(g, [], z)

        def d_loss(d):
            x = ops.concatenate([real, fake])
            y, _ = self.discriminator.stateless_call(d, [], x)
            return ops.mean(y * d_r)

        d, d_state = self.d_optimizer.stateless_apply(
            d_state, jax.grad(d_loss)(d), d
        )

        def g_loss(g):
            fake, _ = self.generator.stateless_call(g, [], z)
            y, _ = self.discriminator.stateless_call(d, [], fake)
            return ops.mean(y * g_r)

        g, g_state = self.g_optimizer.stateless_apply(
            g_state, jax.grad(g_loss)(g), g
        )
        return g, d, g_state, d_state


GAN_OF_BACKEND = {
    "tensorflow": GANWithTape,
    "jax": StatelessGAN,
    "torch": GANWithBackward,
}[keras.backend.backend()]


def test_both_optimizers_of_a_gan_measure_as_if_they_were_alone(rng):
    gan = GAN_OF_BACKEND()
    shapes = ((5, 3), (5, 4), (10, 2), (5, 2))
    batches = [
        [rng.normal(size=shape).astype("float32") for shape in shapes]
        for _ in range(5)
    ]
    gan.train(batches)
    g_fishers = fishers(gan.g_optimizer, gan.generator)
    d_fishers = fishers(gan.d_optimizer, gan.discriminator)

    def train(model, trained, steps, optimizer):
        model.compile(optimizer, loss=product_loss)
        for x, r in steps:
            model.train_on_batch(x, r)
        return fishers(optimizer, trained)

    d = gan.discriminator
    d_steps = []
    for z, real, r, _ in batches:
        fake = to_numpy(gan.generator(z))
        d_steps.append((np.concatenate([real, fake]), r))
    d_optimizer = keras_adafisher.AdaFisher(factor_update_steps=3, **MEASURING)
    assert_close(d_fishers, train(d, d, d_steps, d_optimizer), 1e-6)

    d.trainable = False
    g = gan.generator
    g_steps = [(z, r) for z, _, _, r in batches]
    g_optimizer = keras_adafisher.AdaFisher(factor_update_steps=2, **MEASURING)
    whole = keras.Sequential([keras.Input((3,)), g, d])
    assert_close(g_fishers, train(whole, g, g_steps, g_optimizer), 1e-6)
