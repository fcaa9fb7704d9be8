"""How do time and memory of a step compare on one GPU? With JAX and PyTorch.

    make bench-gpu

in less than eight minutes. Without a GPU, `make bench-gpu-tiny` runs all of it
in a tiny form, which tells whether it works and nothing else.

A process for each model (`gpu_worker.py`) compiles the step of each optimizer,
all processes side by side. Once all are ready, they take turns with the GPU:
first those of JAX, then those of PyTorch. What they find is in
benchmarks/results/gpu/gpu-jax.json and gpu-torch.json, where models that aren't
measured anew keep what they have of the same day, GPU and versions.
`tools/report/performance_gpu/` makes docs/performance_gpu.md of it.

This file and the one that makes the page need Python alone. The interpreter
that runs it also runs the processes: it needs JAX and PyTorch that see the GPU,
and Keras; the package is imported from this folder. For an interpreter other
than that of the Makefile's virtual environment:

    make bench-gpu GPU_PYTHON=python3

Where there is no network and Keras is missing, carry wheels. Where there is
one, for Python 3.12:

    pip download --no-deps --only-binary=:all: --python-version 3.12 \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
      --dest wheels keras==3.15.1 namex optree

and where the GPU is:

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site make bench-gpu GPU_PYTHON=python3

Keras also imports h5py, ml_dtypes, absl-py, packaging and rich (which imports
markdown-it-py, mdurl and pygments): carry those that `python3 -m pip list`
doesn't have. JAX brings ml_dtypes along. optree and h5py are compiled, for one
version of Python. The versions that this package is tested with are in
constraints.txt.
"""

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
BACKENDS = {"jax": "JAX", "torch": "PyTorch"}
# As in `gpu_models.py`, which only a process with Keras can import.
MODELS = ("gpt", "vit", "resnet50", "resnet")
# How to ask for the GPU's name.
PROBES = {
    "jax": "import jax; print(jax.devices('gpu')[0].device_kind)",
    "torch": "import torch; print(torch.cuda.get_device_name())",
}
# Seconds since a backend's start. Those who are ready don't wait longer for the
# others, so that there is time for their turns.
LATEST_GO = 200
# Seconds that a turn may take.
LONGEST_TURN = 75
# Seconds since the start of all.
LIMIT = 470
NO_GPU = """\
No GPU for {backend}: {reason}
This measures time and memory on a GPU. `--tiny` runs all of it in a tiny form
on a CPU, and `--backends` leaves a backend out."""


# Trying out which kernel is fastest takes most of the time that it takes to
# compile, and with 24 programs at once it takes longer than a run may. The
# kernels of matrix products are the library's own choice instead, for all
# optimizers. Of convolutions, that choice is many times slower than the best:
# those are tried out, without a look at what they compute.
NO_TUNING = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
TUNED_CONVOLUTIONS = NO_TUNING.replace("level=0", "level=1")
WITH_CONVOLUTIONS = ("vit", "resnet50", "resnet")


def flags_of(model, tunes):
    """The flags of XLA for a model. None if XLA is to try out all kernels."""
    if tunes:
        return ""
    return TUNED_CONVOLUTIONS if model in WITH_CONVOLUTIONS else NO_TUNING


def environment(backend, tiny, flags=NO_TUNING):
    """The variables of a process.

    Args:
        backend: String.
        tiny: Bool.
        flags: String, of XLA on a GPU.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    result = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # The processes share the memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if tiny:
        # Nobody looks at these times, so LLVM needn't take any to optimize.
        result.update(
            JAX_PLATFORMS="cpu",
            CUDA_VISIBLE_DEVICES="",
            XLA_FLAGS="--xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
        )
    else:
        # XLA compiles with as many threads. `common.py` would have one.
        result["NPROC"] = str(os.cpu_count())
        result.setdefault("CUDA_VISIBLE_DEVICES", "0")
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        if flags:
            # XLA takes what is empty for the name of a file.
            result["XLA_FLAGS"] = flags
    return result


def check_gpu(backends):
    """Leave with a message if a backend has no GPU."""
    probes = {
        backend: subprocess.Popen(
            [sys.executable, "-c", PROBES[backend]],
            env=environment(backend, tiny=False),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for backend in backends
    }
    answers = {name: probe.communicate() for name, probe in probes.items()}
    for backend, (name, errors) in answers.items():
        if probes[backend].returncode:
            reason = (errors.strip().splitlines() or ["it crashed"])[-1]
            sys.exit(NO_GPU.format(backend=BACKENDS[backend], reason=reason))
        print(f"{BACKENDS[backend]} runs on {name.strip()}", flush=True)


class Worker:
    """One process: a model on a backend.

    Args:
        backend, model: Strings.
        folder: Path, for all that the processes tell.
        arguments: What the command line says.
    """

    def __init__(self, backend, model, folder, arguments):
        self.backend, self.model = backend, model
        self.name = f"{backend}-{model}"
        self._folder = folder
        script = pathlib.Path(__file__).with_name("gpu_worker.py")
        command = [sys.executable, str(script), model, str(folder)]
        command += ["--tiny"] * arguments.tiny
        command += ["--at-once"] * arguments.at_once
        self.flags = flags_of(model, arguments.autotune)
        with self._file("log").open("w") as log:
            self._process = subprocess.Popen(
                command,
                env=environment(backend, arguments.tiny, self.flags),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _file(self, ending):
        return self._folder / f"{self.name}.{ending}"

    @property
    def is_running(self):
        return self._process.poll() is None

    @property
    def is_ready(self):
        return self._file("ready").exists()

    def give_turn(self):
        """Let it use the GPU. Nobody else does until it ends."""
        self._file("go").touch()

    def found(self):
        """What it measured, `None` if it failed."""
        path = self._file("json")
        return json.loads(path.read_text()) if path.exists() else None

    def log(self):
        """The end of what it printed."""
        return self._file("log").read_text(errors="replace")[-2000:]

    def stop(self):
        if self.is_running:
            self._process.kill()
        self._process.wait()


# Rows of an earlier run are kept if these are equal.
SAME = ("level", "tunes", "date", "version", "keras", "package", "device")


class Results:
    """What has been measured, in a file for each backend.

    Files of earlier runs are replaced once there is something to replace them.

    Args:
        folder: Path.
        level: String, "gpu" or "tiny".
        tunes: Bool, whether XLA tried out which kernels are fastest.
    """

    def __init__(self, folder, level, tunes):
        self._folder = folder
        self._data = {
            backend: {
                "level": level,
                "tunes": tunes,
                "date": datetime.date.today().isoformat(),
                "rows": {},
            }
            for backend in BACKENDS
        }
        # What is kept if it has the same values of `SAME`.
        self._before = {
            backend: json.loads(self._path(backend).read_text())
            for backend in BACKENDS
            if self._path(backend).exists()
        }

    def add(self, worker, found):
        data = self._data[worker.backend]
        data.update(found["machine"])
        before = self._before.pop(worker.backend, {})
        if all(before.get(key) == data[key] for key in SAME):
            data["rows"] = {
                model: row
                for model, row in before["rows"].items()
                if row.get("flags") == flags_of(model, data["tunes"])
            }
        if "prototypes" in before:
            data["prototypes"] = before["prototypes"]
        data["rows"][worker.model] = {**found["row"], "flags": worker.flags}
        # In the order of the models, not that of the turns.
        data["rows"] = {
            model: data["rows"][model]
            for model in MODELS
            if model in data["rows"]
        }

    def disturbed_by(self, late):
        """Note who still compiled while others timed."""
        for worker in late:
            names = self._data[worker.backend].setdefault("late", [])
            if worker.name not in names:
                names.append(worker.name)

    def _path(self, backend):
        return self._folder / f"gpu-{backend}.json"

    def write(self):
        self._folder.mkdir(parents=True, exist_ok=True)
        for backend, data in self._data.items():
            if data["rows"]:
                path = self._path(backend)
                # Never half a file.
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(data, indent=1) + "\n")
                temporary.replace(path)


def measure(workers, results, start):
    """Let the workers take turns, and keep what they find.

    Args:
        workers: List of `Worker`, in the order of their turns.
        results: `Results`.
        start: Float, when all began.

    Returns:
        The names of those that found nothing.
    """
    failed = []
    running = list(workers)
    turn = None
    own_start = time.monotonic()
    while running:
        passed = time.monotonic() - start
        waited = time.monotonic() - own_start
        late = [worker for worker in running if not worker.is_ready]
        if turn not in running and (not late or waited > LATEST_GO):
            ready = [worker for worker in running if worker.is_ready]
            if ready:
                turn, turn_start = ready[0], time.monotonic()
                results.disturbed_by(late)
                turn.give_turn()
                print(f"{passed:.0f} s: {turn.name} has the GPU", flush=True)
        if turn in running and time.monotonic() - turn_start > LONGEST_TURN:
            print(f"{passed:.0f} s: {turn.name} takes too long", flush=True)
            turn.stop()
        for worker in [w for w in running if not w.is_running]:
            running.remove(worker)
            found = worker.found()
            if found is None:
                failed.append(worker.name)
                print(f"{worker.name} failed:\n{worker.log()}", flush=True)
                continue
            results.add(worker, found)
            results.write()
            ratios = {
                name: round(ratio["median"], 3)
                for name, ratio in found["row"]["over Adam"].items()
            }
            print(f"{passed:.0f} s: {worker.name}: {ratios}", flush=True)
        if passed > LIMIT:
            failed += [worker.name for worker in running]
            print(f"{passed:.0f} s: out of time", flush=True)
            break
        time.sleep(0.2)
    return failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tiny", action="store_true", help="on a CPU, to see whether it works"
    )
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS)
    )
    parser.add_argument(
        "--autotune",
        action="store_true",
        help="let XLA try out kernels, as it does by default; it takes minutes",
    )
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="compile all programs of a model at once: sooner, but what each "
        "takes isn't known then",
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS)
    )
    parser.add_argument("--results", type=pathlib.Path)
    arguments = parser.parse_args()
    level = "tiny" if arguments.tiny else "gpu"
    default = ROOT / "benchmarks" / "results" / level
    results = Results(arguments.results or default, level, arguments.autotune)
    start = time.monotonic()
    if not arguments.tiny:
        check_gpu(arguments.backends)
    failed = []
    for backend in arguments.backends:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            workers = []
            try:
                for model in arguments.models:
                    workers.append(Worker(backend, model, folder, arguments))
                failed += measure(workers, results, start)
            finally:
                for worker in workers:
                    worker.stop()
    if failed:
        sys.exit(f"Not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
