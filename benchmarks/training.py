"""Whole training runs as compiled JAX programs.

A scan over the steps of an epoch has no Python between the steps. So what is
compared is what the device computes, and a run of a small model takes seconds.
Keras' stateless API is all that it takes: `stateless_call`, `stateless_apply`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import keras
import numpy as np

import keras_adafisher

WARM_UP = 0.05


@dataclasses.dataclass
class Run:
    """What a training run left.

    Attributes:
        train, validation: Lists of losses, one for each evaluation.
        test_score: List of scores, one for each evaluation.
    """

    train: list
    validation: list
    test_score: list


class Trainer:
    """Train one task with one optimizer, at any learning rate and seed.

    All runs share one compiled program.

    Args:
        task: `QualityTask`.
        make_optimizer: Function without arguments.
        schedule: "cosine" or "constant".
        batch_size: Integer. Defaults to the task's.
    """

    def __init__(
        self, task, make_optimizer, schedule="cosine", batch_size=None
    ):
        self.task = task
        self.make_optimizer = make_optimizer
        self.schedule = schedule
        self.batch_size = batch_size or task.batch_size
        self.model, self.optimizer = self._make(seed=0)
        self._rate = [
            v is self.optimizer.learning_rate for v in self.optimizer.variables
        ].index(True)
        self._fresh = {}
        self._part = jax.jit(self._run_part, donate_argnums=0)
        self._evaluate = jax.jit(self._score)
        self._data = [
            (jnp.asarray(part.x), jnp.asarray(part.y))
            for part in (task.train, task.validation, task.test)
        ]
        # Between two evaluations.
        self.steps = len(task.train.x) // self.batch_size // task.evaluations

    def run(self, learning_rate, seed, parts=None):
        """Train from fresh weights.

        Args:
            learning_rate: Float.
            seed: Integer, of the weights and of the order of examples.
            parts: Integer, how often to train for as many steps as lie between
                two evaluations. The schedule is made for it. Defaults to the
                task's epochs.

        Returns:
            `Run`.
        """
        parts = parts or self.task.epochs * self.task.evaluations
        total = parts * self.steps
        state = self.fresh_state(seed)
        batches = self.batches(seed)
        run = Run([], [], [])
        for part in range(parts):
            order = jnp.asarray([next(batches) for _ in range(self.steps)])
            state, loss = self._part(
                state, order, part * self.steps, total, learning_rate
            )
            run.train.append(float(loss))
            _, validation, test = self._data
            loss, _ = self._evaluate(*state[:2], *validation)
            run.validation.append(float(loss))
            _, score = self._evaluate(*state[:2], *test)
            run.test_score.append(float(score))
            if not np.isfinite(run.validation[-1]):
                break
        return run

    def batches(self, seed):
        """Rows of a batch, for ever."""
        rng = np.random.default_rng(seed)
        size = self.batch_size
        while True:
            order = rng.permutation(len(self.task.train.x))
            for start in range(0, len(order) - size + 1, size):
                yield order[start : start + size]

    def _make(self, seed):
        keras.utils.set_random_seed(seed)
        model = self.task.make_model()
        optimizer = self.make_optimizer()
        if isinstance(optimizer, keras_adafisher.AdaFisher):
            keras_adafisher.wrap(model)
        optimizer.build(model.trainable_variables)
        return model, optimizer

    def steps_from(self, state, order, learning_rate):
        """Train for as many steps as `order` has rows, and get the state."""
        return self._part(state, order, 0, len(order), learning_rate)[0]

    def fresh_state(self, seed):
        """Values of the weights, the other variables and the optimizer's."""
        if seed not in self._fresh:
            self._fresh[seed] = self._values(*self._make(seed))
        # The program overwrites what it is given.
        return jax.tree.map(jnp.array, self._fresh[seed])

    @staticmethod
    def _values(model, optimizer):
        return tuple(
            [np.array(v.value) for v in variables]
            for variables in (
                model.trainable_variables,
                model.non_trainable_variables,
                optimizer.variables,
            )
        )

    def _run_part(self, state, order, first, total, learning_rate):
        x, y = self._data[0]

        def loss_of(trainable, other, x, y):
            outputs, other = self.model.stateless_call(
                trainable, other, x, training=True
            )
            return self.task.loss(y, outputs), other

        def step(state, now):
            number, rows = now
            trainable, other, optimizer = state
            (loss, other), gradients = jax.value_and_grad(
                loss_of, has_aux=True
            )(trainable, other, x[rows], y[rows])
            optimizer = list(optimizer)
            optimizer[self._rate] = self._rate_at(number, total, learning_rate)
            trainable, optimizer = self.optimizer.stateless_apply(
                optimizer, gradients, trainable
            )
            return (list(trainable), list(other), list(optimizer)), loss

        numbers = first + jnp.arange(len(order))
        state, losses = jax.lax.scan(step, state, (numbers, order))
        return state, jnp.mean(losses)

    def _rate_at(self, number, total, learning_rate):
        rate = jnp.asarray(learning_rate, "float32")
        if self.schedule == "constant":
            return rate
        share = number / total
        warm_up = jnp.minimum(1.0, (number + 1) / (WARM_UP * total))
        return rate * warm_up * 0.5 * (1 + jnp.cos(jnp.pi * share))

    def _score(self, trainable, other, x, y):
        outputs, _ = self.model.stateless_call(
            trainable, other, x, training=False
        )
        loss = self.task.loss(y, outputs)
        if self.task.score == "loss":
            return loss, -loss
        hits = jnp.argmax(outputs, axis=-1) == y
        return loss, jnp.mean(hits.astype("float32"))
