"""AdaFisher under `keras.distribution.DataParallel`, next to one device.

    KERAS_BACKEND=jax python examples/distributed/jax_data_parallel.py

Each device has all weights and its part of each batch. Runs on all GPUs or
TPUs that there are, or on eight devices that JAX makes of one CPU. Then trains
on one device, on the same batches, and prints the difference.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
# For the CPU only. JAX reads it when it is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# JAX' CPU devices share a pool of threads, by default as many as there are
# devices (or cores, if these are more). A collective blocks one for each
# device, so that several at once could take them all and wait forever.
os.environ.setdefault("NPROC", "64")

import common
import keras


def train(distribution, epochs=2):
    """Train the model.

    Args:
        distribution: What to distribute it with. `None`: one device.
        epochs: Int.

    Returns:
        The model.
    """
    # Before the model and the optimizer, since their variables are put where
    # the distribution of that moment says.
    keras.distribution.set_distribution(distribution)
    model = common.make_model()
    model.compile(common.make_optimizer(), loss=common.make_loss())
    model.fit(
        *common.load_digits(),
        # Of all devices together.
        batch_size=common.BATCH_SIZE,
        epochs=epochs,
        shuffle=False,
    )
    return model


def main():
    """Train on several devices, then on one."""
    distribution = keras.distribution.DataParallel()
    several = train(distribution)
    one = train(None)
    common.report(
        f"{distribution.num_model_replicas} devices",
        common.state(several, several.optimizer),
        common.state(one, one.optimizer),
    )


if __name__ == "__main__":
    main()
