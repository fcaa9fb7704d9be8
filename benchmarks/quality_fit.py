"""What a step takes in `fit`, on the quality benchmark's tasks.

    KERAS_BACKEND=jax python benchmarks/quality_fit.py

`benchmarks/quality.py` compiles whole training runs, so that a step costs what
its arithmetic costs: 0.01 ms on the small tables. Whoever trains with `fit`
waits for a batch to be made ready and a step to be started too. That is the
same for all optimizers.

Measured are the optimizers that are tried most there, AdaFisherMuon's other
form where it has one, and each as `anytime` has it, with averages of the
weights, which are one more pass over them. All take turns, and what counts is
the median ratio to AdamW's within a round, in seconds of the processor. A
quarter of an hour.
"""

import statistics
import time

from benchmarks.common import Results
from benchmarks.common import spread
from benchmarks.quality import LENGTHS
from benchmarks.quality import measure_all
from benchmarks.quality import REFERENCE
from benchmarks.quality import task_of
from benchmarks.quality import timed
from benchmarks.quality_rivals import MAIN
from benchmarks.quality_rivals import RIVALS

import keras  # isort: skip
import numpy as np  # isort: skip

import keras_adafisher  # isort: skip

# Too small for weights to change much.
RATE = 1e-5
# Steps in a round, at least, where a step takes well below a millisecond.
SHORT_STEPS = 200
ROUNDS = {"full": 6, "quick": 3, "tiny": 1}


def measure(name, arguments):
    """Add the row of a task to its file."""
    results = Results(f"fit-{name}", arguments)
    rounds = ROUNDS[arguments.level]
    results.add("fit", timed(fit_ratios, name, rounds))


def optimizers(name):
    """Functions that make what is measured on a task."""
    found = {}
    for rival in MAIN:
        make = RIVALS[rival].make
        found[rival] = lambda make=make: make(learning_rate=RATE)
        form = RIVALS[rival].forms.get(name)
        if form:
            found[f"{rival}, other form"] = lambda make=make, form=form: make(
                learning_rate=RATE, **form
            )
        found[f"{rival}, anytime"] = lambda make=make: anytime(make)
    return found


def anytime(make):
    """The optimizer with averages of the weights."""
    if issubclass(make, keras_adafisher.AdaFisher):
        return make.anytime(RATE)
    return make(learning_rate=RATE, use_ema=True)


def fit_ratios(name, rounds):
    """The time of a step in `fit` next to AdamW's, and that in seconds."""
    task = task_of(name)
    steps = task.steps
    if LENGTHS[name] == "short":
        steps = max(steps, SHORT_STEPS)
    # One epoch, however often that sees each example.
    rows = np.resize(np.arange(len(task.train.x)), steps * task.batch_size)
    x, y = task.train.x[rows], task.train.y[rows]
    models = {}
    for program, make_optimizer in optimizers(name).items():
        keras.utils.set_random_seed(0)
        models[program] = task.make_model()
        models[program].compile(make_optimizer(), loss=task.loss)
    times = {program: [] for program in models}
    for turn in range(rounds + 1):
        for program, model in models.items():
            start = time.process_time()
            model.fit(x, y, task.batch_size, verbose=0, shuffle=False)
            # The first turn compiles.
            if turn:
                times[program].append((time.process_time() - start) / steps)
            # Keras' optimizers leave weights and averages of them in the same
            # memory, which another `fit` can't give to JAX twice.
            model.set_weights(model.get_weights())
    reference = times[REFERENCE]
    return {
        **{
            program: spread(np.divide(values, reference))
            for program, values in times.items()
        },
        "seconds": statistics.median(reference),
    }


if __name__ == "__main__":
    measure_all(__doc__, measure)
