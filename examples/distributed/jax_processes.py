"""AdaFisher in two processes, as on two hosts, next to one device.

    KERAS_BACKEND=jax python examples/distributed/jax_processes.py

Starts both processes itself, on this machine's CPU, with two devices each. On
a cluster, each host would run what `worker` does, with the address of the
first host. `keras.distribution.initialize` connects them, and then all is as
with `jax_data_parallel.py` on one host, but for the data: each process hands
its own part of each batch to `fit`. (`DataParallel` does that by itself for a
`tf.data.Dataset`.)
"""

import os
import socket
import subprocess
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
# Two processes can't share a GPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
# JAX' CPU devices share a pool of threads, by default as many as there are
# devices (or cores, if these are more). A collective blocks one for each
# device, so that several at once could take them all and wait forever.
os.environ.setdefault("NPROC", "64")

import common
import keras
from jax_data_parallel import train

PROCESSES = 2


def part_of_each_batch(arrays, rank):
    """A process' part of each batch, for all batches one after the other."""
    part = common.BATCH_SIZE // PROCESSES
    return [
        a.reshape(-1, PROCESSES, part, *a.shape[1:])[:, rank].reshape(
            -1, *a.shape[1:]
        )
        for a in arrays
    ]


def train_together(rank, epochs=2):
    """What each of the processes does, once they are connected."""
    distribution = keras.distribution.DataParallel(
        # `fit` gets arrays, and these are parts already.
        auto_shard_dataset=False
    )
    keras.distribution.set_distribution(distribution)
    model = common.make_model()
    model.compile(common.make_optimizer(), loss=common.make_loss())
    model.fit(
        *part_of_each_batch(common.load_digits(), rank),
        batch_size=common.BATCH_SIZE // PROCESSES,
        epochs=epochs,
        shuffle=False,
        verbose="auto" if rank == 0 else 0,
    )
    return model


def worker(rank, address):
    """One process."""
    keras.distribution.initialize(address, PROCESSES, rank)
    several = train_together(rank)
    if rank == 0:
        one = train(None)
        common.report(
            f"{PROCESSES} processes",
            common.state(several, several.optimizer),
            common.state(one, one.optimizer),
        )


def main():
    """Start the processes, and end them all if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), address])
        for rank in range(PROCESSES)
    ]
    try:
        failed = [process for process in processes if process.wait()]
    finally:
        for process in processes:
            process.kill()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        worker(int(sys.argv[1]), sys.argv[2])
    else:
        main()
