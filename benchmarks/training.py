"""Whole training runs as compiled JAX programs.

A scan over the steps of an epoch has no Python between the steps. So what is
compared is what the device computes, and a run of a small model takes seconds.
Keras' stateless API is all that it takes: `stateless_call`, `stateless_apply`.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np

import keras_adafisher

WARM_UP = 0.05
# Of the steps so far, how many an average of the weights is over.
AVERAGED_SHARE = 0.1


@dataclasses.dataclass
class Run:
    """What a training run left.

    Attributes:
        validation: List of losses, one for each evaluation.
        lowest: The lowest validation loss, `inf` if none is finite.
        test_score: The score then, as early stopping with the best weights
            restored would have it. NaN if no validation loss is finite.
    """

    validation: list
    lowest: float = float("inf")
    test_score: float = float("nan")


def cosine(steps):
    """Each step's share of the learning rate: a warm-up, then a cosine."""
    numbers = np.arange(steps)
    warm_up = np.minimum(1, (numbers + 1) / (WARM_UP * steps))
    return warm_up * 0.5 * (1 + np.cos(np.pi * numbers / steps))


def inverse_sqrt(steps, decay_steps):
    """The same for `InverseSqrtDecay`, without a warm-up."""
    return 1 / np.sqrt(1 + np.arange(steps) / decay_steps)


SCHEDULES = {
    "constant": np.ones,
    "cosine": cosine,
    # As `AdaFisher.anytime` has it by default, and one that falls later.
    "inverse_sqrt, 100": functools.partial(inverse_sqrt, decay_steps=100),
    "inverse_sqrt, 400": functools.partial(inverse_sqrt, decay_steps=400),
}


@contextlib.contextmanager
def attributes(optimizer, values):
    """Give an optimizer other attributes, as long as it is traced.

    Not by assignment: a value that is traced passes no check.
    """
    own = vars(optimizer)
    before = {name: own[name] for name in values}
    own.update(values)
    try:
        yield
    finally:
        own.update(before)


def shifted(images, rows, pixels):
    """Move each image by up to so many pixels, or return them as they are.

    What moves how far follows from the batch's rows alone, so that all
    optimizers see the same images.
    """
    if not pixels:
        return images
    place = jnp.arange(1, len(rows) + 1)
    key = jax.random.fold_in(jax.random.key(0), jnp.sum(rows * place))
    starts = jax.random.randint(key, (len(rows), 2), 0, 2 * pixels + 1)
    margin = (pixels, pixels)
    padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)))
    return jax.vmap(
        lambda image, start: jax.lax.dynamic_slice(
            image, (*start, 0), images.shape[1:]
        )
    )(padded, starts)


class Trainer:
    """Train one task with one optimizer, at any learning rate and seed.

    All runs share one compiled program: the schedule is an argument of it, and
    so are the optimizer's settings in `traced`. Compiling takes longer than
    most runs.

    Args:
        task: `QualityTask`.
        make_optimizer: Function without arguments.
        traced: Names of the optimizer's attributes that a run may change.
            `None` counts as zero, for a weight decay.

    Attributes:
        settings: Dict from those names to what the optimizer has.
        turn: Function without arguments that returns a context manager, in
            which a part of a run is trained and evaluated. Several processes
            with one device can take turns.
    """

    def __init__(self, task, make_optimizer, traced=()):
        self.task = task
        self.make_optimizer = make_optimizer
        self.model, self.optimizer = self._make(seed=0)
        self.settings = {
            name: float(getattr(self.optimizer, name) or 0) for name in traced
        }
        self._rate = [
            v is self.optimizer.learning_rate for v in self.optimizer.variables
        ].index(True)
        self.turn = contextlib.nullcontext
        self._fresh = {}
        self._part = jax.jit(self._run_part, donate_argnums=(0, 1))
        self._evaluate = jax.jit(self._score)
        self._data = [
            (jnp.asarray(part.x), jnp.asarray(part.y))
            for part in (task.train, task.validation, task.test)
        ]

    def run(
        self,
        learning_rate,
        seed,
        parts=None,
        schedule="cosine",
        is_averaged=False,
        **changes,
    ):
        """Train from fresh weights.

        Args:
            learning_rate: Float.
            seed: Integer, of the weights and of the order of examples.
            parts: Integer, how often to train for as many steps as lie between
                two evaluations. The schedule is made for it. Defaults to the
                task's.
            schedule: A key of `SCHEDULES`.
            is_averaged: Bool, whether to evaluate the average of the weights
                over about a tenth of the steps so far, as our optimizers keep
                it with `ema_momentum="auto"`.
            **changes: Settings in place of the optimizer's own.

        Returns:
            `Run`.
        """
        parts = parts or self.task.parts
        rates = learning_rate * SCHEDULES[schedule](parts * self.task.steps)
        rates = rates.reshape(parts, self.task.steps).astype("float32")
        state, average = self.fresh_state(seed), None
        shares = [None] * parts
        if is_averaged:
            average = jax.tree.map(jnp.array, state[0])
            shares = 1 / (1 + AVERAGED_SHARE * np.arange(rates.size))
            shares = shares.reshape(rates.shape).astype("float32")
        batches = self.batches(seed)
        run = Run([])
        _, validation, test = self._data
        for part in range(parts):
            order = self.next_steps(batches)
            with self.turn():
                state, average = self._part(
                    state,
                    average,
                    order,
                    rates[part],
                    shares[part],
                    {**self.settings, **changes},
                )
                weights = state[0] if average is None else average
                loss = float(self._evaluate(weights, state[1], *validation)[0])
                run.validation.append(loss)
                if loss < run.lowest:
                    run.lowest = loss
                    run.test_score = float(
                        self._evaluate(weights, state[1], *test)[1]
                    )
            if not np.isfinite(loss):
                break
        return run

    def advance(self, state, order, rates, **changes):
        """Train for as many steps as `order` has rows, and get the state."""
        settings = {**self.settings, **changes}
        return self._part(state, None, order, rates, None, settings)[0]

    def next_steps(self, batches, count=None):
        """The rows of the next batches, as many as a part has."""
        count = count or self.task.steps
        return jnp.asarray([next(batches) for _ in range(count)])

    def batches(self, seed):
        """Rows of a batch, for ever."""
        rng = np.random.default_rng(seed)
        size = self.task.batch_size
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

    def _run_part(self, state, average, order, rates, shares, settings):
        x, y = self._data[0]

        def loss_of(trainable, other, x, y):
            outputs, other = self.model.stateless_call(
                trainable, other, x, training=True
            )
            return self.task.loss(y, outputs), other

        @keras_adafisher.training_step(self.optimizer)
        def step(state, now):
            rate, rows = now
            trainable, other, optimizer = state
            inputs = shifted(x[rows], rows, self.task.shift)
            gradients, other = jax.grad(loss_of, has_aux=True)(
                trainable, other, inputs, y[rows]
            )
            optimizer = list(optimizer)
            optimizer[self._rate] = rate
            trainable, optimizer = self.optimizer.stateless_apply(
                optimizer, gradients, trainable
            )
            return list(trainable), list(other), list(optimizer)

        def averaged_step(both, now):
            state, average = both
            rate, rows, share = now
            state = step(state, (rate, rows))
            if average is not None:
                average = [
                    a + share * (w - a)
                    for a, w in zip(average, state[0], strict=True)
                ]
            return (state, average), None

        with attributes(self.optimizer, settings):
            return jax.lax.scan(
                averaged_step, (state, average), (rates, order, shares)
            )[0]

    def _score(self, trainable, other, x, y):
        outputs, _ = self.model.stateless_call(
            trainable, other, x, training=False
        )
        loss = self.task.loss(y, outputs)
        if self.task.score == "loss":
            return loss, -loss
        hits = jnp.argmax(outputs, axis=-1) == y
        return loss, jnp.mean(hits.astype("float32"))
