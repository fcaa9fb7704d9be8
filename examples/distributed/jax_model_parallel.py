"""AdaFisher under `keras.distribution.ModelParallel`, next to one device.

    KERAS_BACKEND=jax python examples/distributed/jax_model_parallel.py

The devices form a mesh. Along its first axis the batch is split, along its
second the weights are, in the way that a `LayoutMap` says. Momentums and
Kronecker factors are split like their weights, and need no lines of their own
in it. Runs on all GPUs or TPUs that there are, or on eight devices that JAX
makes of one CPU. Then trains on one device, on the same batches, and prints
the difference.
"""

import math
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
from jax_data_parallel import train


def make_distribution():
    """Up to four devices share the weights: with eight, a mesh of 2 x 4."""
    devices = keras.distribution.list_devices()
    parts = math.gcd(len(devices), 4)
    mesh = keras.distribution.DeviceMesh(
        shape=(len(devices) // parts, parts),
        axis_names=("batch", "model"),
        devices=devices,
    )
    layout_map = keras.distribution.LayoutMap(mesh)
    # The filters of the convolution and the units of the dense layer.
    layout_map[".*conv/kernel"] = (None, None, None, "model")
    layout_map[".*conv/bias"] = ("model",)
    layout_map[".*hidden/kernel"] = (None, "model")
    layout_map[".*hidden/bias"] = ("model",)
    # The inputs of the last layer, which are the units of the one before.
    layout_map[".*logits/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def main():
    """Train on several devices, then on one."""
    distribution = make_distribution()
    several = train(distribution)
    print("\nWhat is split:")
    for variable in (*several.weights, *several.optimizer.variables):
        axes = tuple(variable.value.sharding.spec)
        if any(axes):
            print(f"  {variable.path} {variable.shape}: {axes}")
    one = train(None)
    common.report(
        f"A mesh of {distribution.device_mesh.shape} devices",
        common.state(several, several.optimizer),
        common.state(one, one.optimizer),
    )


if __name__ == "__main__":
    main()
