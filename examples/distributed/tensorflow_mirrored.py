"""Train on several devices of one machine with `tf.distribute`.

    python examples/distributed/tensorflow_mirrored.py --replicas 2

`tf.distribute.MirroredStrategy` keeps a copy of the model on each device. A
batch is divided among them, and each device computes the gradients of its
part. AdaFisher needs no line of code for it: create the model, and compile it,
inside `strategy.scope()`.

With fewer GPUs than replicas, the CPU is divided into as many logical devices:
nothing gets faster, but it computes what that many GPUs would.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import common
import tensorflow as tf

EPOCHS = 2


def choose_devices(number):
    """The names of as many GPUs, or else of as many parts of the CPU."""
    gpus = tf.config.list_logical_devices("GPU")
    if len(gpus) >= number:
        return [device.name for device in gpus[:number]]
    return [
        device.name for device in tf.config.list_logical_devices("CPU")[:number]
    ]


def divide_cpu(number):
    """Make logical CPU devices. Only possible before TensorFlow starts."""
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * number,
    )


def train(strategy):
    """Train on the strategy's devices.

    Returns:
        What `common.state` says of the model and the optimizer.
    """
    x, y = common.load_digits()
    with strategy.scope():
        model = common.make_model()
        optimizer = common.make_optimizer()
        model.compile(optimizer, loss=common.make_loss(), metrics=["accuracy"])
    # The batch size is that of all devices together.
    model.fit(
        x,
        y,
        batch_size=common.BATCH_SIZE,
        epochs=EPOCHS,
        shuffle=False,
        verbose=2,
    )
    return common.state(model, optimizer)


def main():
    """Train twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2, metavar="N")
    replicas = parser.parse_args().replicas
    divide_cpu(replicas)

    devices = choose_devices(replicas)
    print(f"Training on {', '.join(devices)}")
    several = train(tf.distribute.MirroredStrategy(devices))

    print("Training on one device")
    one = train(tf.distribute.get_strategy())
    common.report(f"{replicas} replicas", several, one)


if __name__ == "__main__":
    main()
