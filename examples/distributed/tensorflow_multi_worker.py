"""Train in several processes with `tf.distribute`, and survive a crash.

    python examples/distributed/tensorflow_multi_worker.py --kill-at-step 25

Starts two workers on this machine, which talk over the loopback interface, as
the workers of a cluster talk over its network. With `--kill-at-step` the
second of them is killed in the middle of an epoch. The launcher then stops the
other one, which waits in vain, and starts both again. They go on from the
backup of the last complete epoch, factors and momentum included, and end with
the weights of a run that nobody disturbed.

Keras 3.15 can't `fit` under `tf.distribute.MultiWorkerMirroredStrategy`, with
any optimizer. So this is a training loop of one's own. In it, create the
model, compile it (or call `keras_adafisher.wrap`) and build the optimizer
inside `strategy.scope()`.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

os.environ["KERAS_BACKEND"] = "tensorflow"

import common
import keras
import numpy as np
import tensorflow as tf

import keras_adafisher

WORKERS = 2
EPOCHS = 2
STEPS_PER_EPOCH = common.EXAMPLES // common.BATCH_SIZE


def launch(command, restarts=1):
    """Start the workers, and start all of them again if one fails.

    On a cluster, its scheduler does this.

    Args:
        command: List of strings, a worker's command line.
        restarts: Int, how often to start again.

    Raises:
        RuntimeError: A worker failed once too often.
    """
    for attempt in range(restarts + 1):
        addresses = [f"127.0.0.1:{port}" for port in free_ports(WORKERS)]
        workers = []
        for index in range(WORKERS):
            config = {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": index},
            }
            environment = {
                **os.environ,
                "TF_CONFIG": json.dumps(config),
                "ATTEMPT": str(attempt),
            }
            workers.append(subprocess.Popen(command, env=environment))
        try:
            codes = wait(workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if not any(codes):
            return
        print(f"A worker has failed. Exit codes: {codes}", flush=True)
    raise RuntimeError("Workers keep failing")


def free_ports(number):
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait(workers):
    """Wait until all have ended, or one has failed.

    Returns:
        List of exit codes, `None` for a worker that still runs.
    """
    while True:
        codes = [worker.poll() for worker in workers]
        if None not in codes or any(codes):
            return codes
        time.sleep(0.1)


def make_step(strategy, model, optimizer, loss_fn):
    """A training step of all workers, as a `tf.function`."""

    @keras_adafisher.training_step(optimizer)
    def replica_step(x, y):
        with tf.GradientTape() as tape:
            # The mean over this worker's part of the batch, divided by the
            # number of workers: the workers' gradients are summed.
            loss = loss_fn(y, model(x, training=True))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    @tf.function
    def step(x, y):
        losses = strategy.run(replica_step, args=(x, y))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    return step


def train(strategy, worker, directory, before_step=lambda step: None):
    """Train as one of the workers.

    Args:
        strategy: `tf.distribute.Strategy`.
        worker: Int, which of the workers this is.
        directory: String, where the backups are. All workers see it.
        before_step: Callable that is given the number of the step.

    Returns:
        What `common.state` says of the model and the optimizer.
    """
    x, y = common.load_digits()
    with strategy.scope():
        model = common.make_model()
        optimizer = common.make_optimizer()
        model.compile(optimizer)
        optimizer.build(model.trainable_variables)
    step = make_step(strategy, model, optimizer, common.make_loss())

    # All read what the first worker wrote. The others write as well, since
    # reading some variables (none of this model) takes all workers, but each
    # into a directory of its own.
    read_backup = keras.callbacks.BackupAndRestore(f"{directory}/worker_0")
    write_backup = keras.callbacks.BackupAndRestore(
        f"{directory}/worker_{worker}",
        # Should it be killed while it writes.
        double_checkpoint=True,
        delete_checkpoint=False,
    )
    read_backup.set_model(model)
    write_backup.set_model(model)
    read_backup.on_train_begin()

    # A batch of the data set is that of all workers together.
    batches = tf.data.Dataset.from_tensor_slices((x, y))
    batches = batches.batch(common.BATCH_SIZE, drop_remainder=True)
    batches = strategy.experimental_distribute_dataset(batches)
    first_epoch = int(optimizer.iterations.numpy()) // STEPS_PER_EPOCH
    for epoch in range(first_epoch, EPOCHS):
        losses = []
        for index, batch in enumerate(batches):
            before_step(epoch * STEPS_PER_EPOCH + index)
            losses.append(float(step(*batch)))
        write_backup.on_epoch_end(epoch)
        if worker == 0:
            print(
                f"Epoch {epoch + 1}/{EPOCHS} - loss: {np.mean(losses):.4f}",
                flush=True,
            )
    return common.state(model, optimizer)


def run_worker(directory, kill_at_step):
    """What each of the processes does."""
    # Before anything else of TensorFlow: it starts a server.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    worker = strategy.cluster_resolver.task_id

    def before_step(step):
        is_victim = worker == WORKERS - 1 and os.environ["ATTEMPT"] == "0"
        if is_victim and step == kill_at_step:
            print(f"Worker {worker} is killed at step {step}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    several = train(strategy, worker, directory, before_step)
    np.savez(f"{directory}/worker_{worker}.npz", **several)


def main():
    """Start the workers and compare with one device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kill-at-step", type=int, metavar="STEP")
    parser.add_argument("--output", metavar="FILE.npz")
    # Given to the workers.
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.directory:
        run_worker(arguments.directory, arguments.kill_at_step)
        return

    with tempfile.TemporaryDirectory() as directory:
        print(f"Training in {WORKERS} processes", flush=True)
        launch([sys.executable, *sys.argv, "--directory", directory])
        several = dict(np.load(f"{directory}/worker_0.npz"))

    if arguments.output:
        np.savez(arguments.output, **several)

    print("Training on one device", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        one = train(tf.distribute.get_strategy(), 0, directory)
    common.report(f"{WORKERS} workers", several, one)


if __name__ == "__main__":
    main()
