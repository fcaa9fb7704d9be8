"""Two workers of a `MultiWorkerMirroredStrategy` next to one device.

Run by `test_distributed_tensorflow.py` with a directory, in which it saves the
weights and the optimizer's variables as `worker_0.npz` and `worker_1.npz`.
Prints one line of JSON.
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
import tensorflow_multi_worker as example


def count(strategy, make_optimizer):
    """The all-reduces of a training step, and its model."""
    x, y = common.load_digits()
    with strategy.scope():
        model = common.make_model()
        optimizer = make_optimizer()
        model.compile(optimizer)
        optimizer.build(model.trainable_variables)
    step = example.make_step(strategy, model, optimizer, common.make_loss())
    part = common.BATCH_SIZE // example.WORKERS
    function = step.get_concrete_function(x[:part], y[:part])
    return tensorflow_collectives.collectives(function, 1), model


def fit_fails(strategy):
    """Whether Keras' `fit` raises an error, with Keras' own optimizer."""
    with strategy.scope():
        model = common.make_model()
        model.compile("adam", loss=common.make_loss())
    x, y = common.load_digits()
    try:
        model.fit(x, y, batch_size=common.BATCH_SIZE, verbose=0)
    except ValueError as error:
        return "PerReplica" in str(error)
    return False


def run_worker(directory):
    """What each of the two processes does."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    worker = strategy.cluster_resolver.task_id
    several = example.train(strategy, worker, directory)
    ours, model = count(strategy, common.make_optimizer)
    sgd, _ = count(strategy, lambda: keras.optimizers.SGD(momentum=0.9))
    result = tensorflow_collectives.costs(ours, sgd, model)
    result["keras_fit_fails"] = fit_fails(strategy)
    np.savez(f"{directory}/worker_{worker}.npz", **several)
    with open(f"{directory}/worker_{worker}.json", "w") as file:
        json.dump(result, file)


def main():
    """Print the line."""
    directory = sys.argv[1]
    if "TF_CONFIG" in os.environ:
        run_worker(directory)
        return
    example.launch([sys.executable, *sys.argv], restarts=0)
    several = dict(np.load(f"{directory}/worker_0.npz"))
    with open(f"{directory}/worker_0.json") as file:
        costs = json.load(file)
    one = example.train(tf.distribute.get_strategy(), 0, f"{directory}/one")
    result = {
        "engine": "MultiWorkerMirroredStrategy",
        "devices": example.WORKERS,
        "difference": common.difference(several.values(), one.values()),
        **costs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
