"""A `tf.distribute.MirroredStrategy` next to one device.

Run by `test_distributed_tensorflow.py` with the number of replicas. Prints one
line of JSON. One process per number: the collectives of two strategies in one
process get into each other's way.
"""

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"

# isort: split
# The first makes the others known.
import tensorflow_collectives

# isort: split
import common
import keras
import numpy as np
import tensorflow as tf
import tensorflow_mirrored as example
from models import cross_entropy
from models import data
from models import mlp

import keras_adafisher


def train_step(strategy, optimizer):
    """A traced training step and its model."""
    x, y = common.load_digits()
    with strategy.scope():
        model = common.make_model()
        model.compile(optimizer(), loss=common.make_loss())
        model.optimizer.build(model.trainable_variables)

    # What `fit` makes of it.
    training_step = keras_adafisher.training_step(model.optimizer)

    @tf.function
    def step(x, y):
        return strategy.run(training_step(model.train_step), args=((x, y),))

    part = common.BATCH_SIZE // strategy.num_replicas_in_sync
    return step.get_concrete_function(x[:part], y[:part]), model


def is_finite_with_empty_replicas(strategy, optimizer):
    """Train on a batch for all replicas and a batch of one example."""
    with strategy.scope():
        model = mlp()
        model.compile(optimizer(), loss=cross_entropy())
    x, y = data(examples=25)
    model.fit(x, y, batch_size=24, epochs=2, shuffle=False, verbose=0)
    state = common.state(model, model.optimizer).values()
    return all(np.isfinite(array).all() for array in state)


def main():
    """Print the line."""
    replicas = int(sys.argv[1])
    example.divide_cpu(replicas)
    strategy = tf.distribute.MirroredStrategy(example.choose_devices(replicas))
    result = {"engine": "MirroredStrategy", "devices": replicas}

    several = example.train(strategy)
    one = example.train(tf.distribute.get_strategy())
    result["difference"] = common.difference(several.values(), one.values())

    def momentum_sgd():
        return keras.optimizers.SGD(momentum=0.9)

    steps = [
        train_step(strategy, optimizer)
        for optimizer in (common.make_optimizer, momentum_sgd)
    ]
    counts = [
        tensorflow_collectives.collectives(step, replicas) for step, _ in steps
    ]
    result.update(tensorflow_collectives.costs(*counts, steps[0][1]))

    def measures_always():
        return keras_adafisher.AdaFisher(factor_update_steps=1)

    result["is_adam_finite"] = is_finite_with_empty_replicas(
        strategy, keras.optimizers.Adam
    )
    result["is_finite"] = is_finite_with_empty_replicas(
        strategy, measures_always
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
