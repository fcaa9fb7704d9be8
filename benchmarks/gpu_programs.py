"""What JAX compiles for a GPU, on a machine that has none.

    make gpu-programs GPU_PYTHON=python3

JAX can compile for a GPU that isn't there. So the kernels of a training step
can be counted on any machine, and its memory and what compiling takes can be
measured, but not how long a step takes: `gpu.py` does that. For the models of
`gpu_models.py`, in benchmarks/results/gpu/programs.json, in twenty minutes.

It is what XLA does by default, but that it can't try out kernels, and that
attention isn't cuDNN's, which Keras takes if it sees a GPU. `gpu.py` leaves
Triton's matrix products out too.

The interpreter needs Keras and JAX with its plugin for CUDA, which is large:

    pip install "jax[cuda13]" keras
"""

import argparse
import datetime
import json
import os
import pathlib
import time

# The plugin looks for a GPU's libraries before it is asked for anything.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
from gpu_models import make_task
from gpu_models import MODELS
from gpu_models import OPTIMIZERS
from jax.experimental import topologies
from jax_program import fit_step
from jax_program import peak_bytes
from jax_program import started_kernels
from jax_program import state_of

import keras_adafisher

ROOT = pathlib.Path(__file__).parents[1]
DEVICE = "NVIDIA H100 80GB HBM3"
# As CUDA tells of the device.
H100 = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_core": 233472,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "l2_cache_size": 52428800,
    "memory_bandwidth": 3352320000000,
    "clock_rate_ghz": 1.98,
    "device_memory_size": 84942979072,
    "device_address_bits": 64,
    "ecc_enabled": "true",
    "name": f'"{DEVICE}"',
    "device_vendor": '"NVIDIA Corporation"',
    "cuda_compute_capability": "{ major: 9 }",
    "driver_version": '"13.0.0"',
    "runtime_version": '"13.0.0"',
    "compile_time_toolkit_version": '"13.0.0"',
}


def sharding():
    """Of arrays on the GPU that isn't there."""
    info = "\n".join(
        f"{name} {value}" if name.startswith("cuda_") else f"{name}: {value}"
        for name, value in H100.items()
    )
    config = (
        f"gpu_device_info {{ {info} }}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 12 }\n"
        f'device_description_str: "{DEVICE}"\n'
    )
    try:
        topology = topologies.get_topology_desc(
            "h100", platform="cuda", topology="1x1x1", target_config=config
        )
    except NotImplementedError as error:
        raise SystemExit(
            "This JAX can't compile for a GPU. Install its plugin for CUDA, "
            'for instance by `pip install "jax[cuda13]"`, and name the '
            "interpreter that has it: `GPU_PYTHON=python3`."
        ) from error
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compiled(task, optimizer, place):
    """The program of a training step, as `gpu_worker.py` has it."""
    step = fit_step(task, optimizer)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (
            state_of(task.model),
            (jax.numpy.asarray(task.x), jax.numpy.asarray(task.y)),
        ),
    )
    lowered = step.trace(*arguments).lower(lowering_platforms=("cuda",))
    start = time.process_time()
    program = lowered.compile()
    return program, time.process_time() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=pathlib.Path)
    arguments = parser.parse_args()
    level = "tiny" if arguments.tiny else "gpu"
    folder = arguments.results or ROOT / "benchmarks" / "results" / level
    # The package asks JAX what it trains on.
    jax.default_backend = lambda: "gpu"
    place = sharding()
    path = folder / "programs.json"
    data = {
        "level": level,
        "date": datetime.date.today().isoformat(),
        "version": jax.__version__,
        "keras": keras.__version__,
        "package": keras_adafisher.__version__,
        "device": DEVICE,
        "rows": json.loads(path.read_text())["rows"] if path.exists() else {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        row = {}
        for optimizer, make_optimizer in OPTIMIZERS.items():
            task = make_task(model, arguments.tiny)
            program, seconds = compiled(task, make_optimizer(), place)
            row[optimizer] = {
                "kernels": started_kernels(program.as_text()),
                "peak_bytes": peak_bytes(program),
                "processor_seconds": round(seconds, 2),
            }
            print(model, optimizer, row[optimizer], flush=True)
        # Models that aren't measured anew keep what they have, and there is
        # never half a row, or half a file.
        data["rows"][model] = row
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        temporary.replace(path)


if __name__ == "__main__":
    main()
