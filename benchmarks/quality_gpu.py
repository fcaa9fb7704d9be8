"""A GPT of 25 million weights, on one GPU, tuned as in `quality.py`.

    make quality-gpu

It learns the source text of installed packages, byte by byte. A process for
each optimizer tunes it, trains fresh seeds of what tuning chose, and
AdaFisherMuon without its factors. All compile at once, each with the first
part of a run, and then take turns with the GPU: it is many times slower where
several processes share it. No run starts
after `--seconds`. What they find is in benchmarks/results/gpu/quality.json.

What a step takes on a GPU is in docs/performance_gpu.md. Needs what
`benchmarks/gpu.py` needs, with JAX only, and mlxtend and scikit-learn. `--tiny`
is a trial on a CPU.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from gpu import check_gpu
from gpu import environment
from gpu import ROOT

PACKAGES = ("keras", "jax", "numpy", "scipy", "sklearn")
# The learning rates that tuning starts around. Larger models want lower ones
# than those of `quality_rivals.py`.
CENTRES = {
    "AdamW": 1e-3,
    "Nadam": 1e-3,
    "Muon": 2.5e-3,
    "AdaFisherMuon": 1e-2,
}
TASK = "25 million weights"
SIZES = {"size": 512, "depth": 8, "length": 256, "batch": 64}
SCHEDULE = {"steps": 50, "parts": 8}
TINY = {"size": 8, "depth": 1, "length": 8, "batch": 4}
TINY_SCHEDULE = {"steps": 2, "parts": 2}


def source_bytes(count):
    """So many bytes at least of the source of installed packages."""
    parts = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        folder = pathlib.Path(spec.submodule_search_locations[0])
        parts += [path.read_bytes() for path in sorted(folder.rglob("*.py"))]
    text = b"".join(parts)
    if len(text) < count:
        raise SystemExit(
            f"The packages {', '.join(PACKAGES)} have {len(text)} bytes of "
            f"source, and {count} are needed."
        )
    return text


def make_task(size, depth, length, batch, steps, parts):
    """The GPT, and as many windows of text as its steps see."""
    import keras
    import numpy as np

    from benchmarks import quality_tasks

    held_out = 5 * batch
    count = steps * parts * batch + 2 * held_out
    text = np.frombuffer(source_bytes(count * (length + 1)), "uint8")
    x, y = quality_tasks.windows(text.astype("int32"), length, count)
    keras.config.set_dtype_policy("mixed_bfloat16")
    return quality_tasks.QualityTask(
        lambda: quality_tasks.language_model(256, length, size, depth),
        *quality_tasks.split(x, y, held_out, held_out),
        batch_size=batch,
        steps=steps,
        parts=parts,
        score="loss",
    )


class Turns:
    """Lets one process at a time use the GPU.

    Args:
        path: Path of a file that all processes lock.

    Attributes:
        seconds: Float, how long this process has had its turns.
    """

    def __init__(self, path):
        self._file = path.open("w")
        self.seconds = 0.0

    @contextlib.contextmanager
    def turn(self):
        """Wait for the GPU, and have it meanwhile."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
            fcntl.flock(self._file, fcntl.LOCK_UN)


def measure(name, folder, end, tiny):
    """Try one optimizer, in this process."""
    from benchmarks import quality
    from benchmarks.common import machine

    # That is where `Contest` looks for them.
    quality.TASKS[TASK] = lambda: (
        make_task(**TINY, **TINY_SCHEDULE)
        if tiny
        else make_task(**SIZES, **SCHEDULE)
    )
    rival = dataclasses.replace(quality.RIVALS[name], centre=CENTRES[name])
    quality.RIVALS[name] = rival
    runs = []
    # Nobody waits for a turn as long as another compiles.
    turns = Turns(folder / "turns")
    trainer = quality.trainer(TASK, name, False)
    trainer.run(rival.centre, seed=0, parts=1)
    trainer.turn = turns.turn
    print(f"{name}: compiled", flush=True)

    class Contest(quality.Contest):
        """Keeps each run as soon as it is there."""

        def run(self, rate, seed, *args, **kwargs):
            if time.time() > end:
                raise TimeoutError
            before = turns.seconds
            run = super().run(rate, seed, *args, **kwargs)
            names = ("parts", "momentum", "decay", "is_form")
            given = dict(zip(names, args, strict=False))
            key = {"rate": rate, "seed": seed, **given, **kwargs}
            runs.append(
                {
                    "key": {n: v for n, v in key.items() if v is not None},
                    **quality.as_row(run),
                    "lowest": quality.short(run.lowest),
                    # Of the GPU, evaluations too.
                    "seconds": quality.short(turns.seconds - before),
                }
            )
            path = folder / f"{name}.json"
            path.write_text(json.dumps({**machine(), "runs": runs}))
            print(name, runs[-1], flush=True)
            return run

    plan = quality.Plan(3, 3, 1, 2, 0, 0)
    contest = Contest(TASK, name, ratio=1, plan=plan)
    try:
        found = contest.rates()
        contest.steps(found)
        if name == "AdaFisherMuon":
            for factor in (0.5, 1, 2):
                contest.run(
                    factor * found["learning_rate"],
                    0,
                    None,
                    found["momentum"],
                    found["decay"],
                    factor_damping=1e6,
                )
    except TimeoutError:
        print(f"{name}: out of time", flush=True)


def collected(folder, level):
    """What all processes found, `None` if that is nothing."""
    found = {
        name: json.loads(path.read_text())
        for name in CENTRES
        if (path := folder / f"{name}.json").exists()
    }
    if not found:
        return None
    runs = {name: data.pop("runs") for name, data in found.items()}
    return {
        "level": level,
        "date": datetime.date.today().isoformat(),
        **next(iter(found.values())),
        "optimizers": runs,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--results", type=pathlib.Path)
    # Of the processes that this one starts.
    parser.add_argument("--optimizer", choices=CENTRES)
    parser.add_argument("--end", type=float)
    arguments = parser.parse_args()
    if arguments.optimizer:
        measure(
            arguments.optimizer,
            arguments.results,
            arguments.end,
            arguments.tiny,
        )
        return
    if not arguments.tiny:
        check_gpu(["jax"])
    level = "tiny" if arguments.tiny else "gpu"
    target = arguments.results or ROOT / "benchmarks" / "results" / level
    end = time.time() + arguments.seconds
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        command = [sys.executable, __file__, f"--results={folder}"]
        command += [f"--end={end}"] + ["--tiny"] * arguments.tiny
        processes = [
            subprocess.Popen(
                [*command, f"--optimizer={rival}"],
                env=environment("jax", arguments.tiny),
            )
            for rival in CENTRES
        ]
        codes = [process.wait() for process in processes]
        results = collected(folder, level)
    if results:
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1) + "\n"
        (target / "quality.json").write_text(text)
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
