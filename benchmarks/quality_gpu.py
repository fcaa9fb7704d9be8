"""A GPT of 25 million weights, on one GPU, tuned as in `quality.py`.

    make quality-gpu

It learns the source text of installed packages, byte by byte. A process for
each optimizer tries learning rates a factor of two apart, then other momentum
at the best, then fresh seeds; all at once, since no loss depends on how long
anything takes. None starts after `--seconds`. What they find is in
benchmarks/results/gpu/quality.json.

AdaFisherMuon is trained without its factors too. What a step takes on a GPU is
in docs/performance_gpu.md. Needs what `benchmarks/gpu.py` needs, with JAX only,
and mlxtend and scikit-learn. `--tiny` is a trial on a CPU.
"""

import argparse
import datetime
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("NPROC", str(os.cpu_count()))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("keras", "jax", "numpy", "scipy", "sklearn")
# The learning rates that tuning starts around.
RIVALS = {
    "AdamW": 2e-3,
    "Nadam": 2e-3,
    "Muon": 1e-2,
    "AdaFisherMuon": 2e-2,
}
SIZES = {"size": 512, "depth": 8, "length": 256, "batch": 64}
STEPS, PARTS = 50, 8
TINY = {"size": 8, "depth": 1, "length": 8, "batch": 4}
FRESH_SEEDS = (1, 2)


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


def make_task(size, depth, length, batch, steps=STEPS, parts=PARTS):
    """The GPT, and as many windows of text as its steps see."""
    import keras
    import numpy as np

    from benchmarks.models import Positions
    from benchmarks.models import transformer
    from benchmarks.quality_tasks import QualityTask
    from benchmarks.quality_tasks import split

    held_out = 5 * batch
    count = steps * parts * batch + 2 * held_out
    text = np.frombuffer(source_bytes(count * (length + 1)), "uint8")
    windows = text[: len(text) // (length + 1) * (length + 1)]
    windows = windows.reshape(-1, length + 1).astype("int32")
    chosen = np.random.default_rng(0).permutation(len(windows))[:count]
    windows = windows[chosen]

    def make_model():
        keras.config.set_dtype_policy("mixed_bfloat16")
        inputs = keras.Input((length,), dtype="int32")
        h = keras.layers.Embedding(256, size)(inputs)
        h = Positions(length)(h)
        h = transformer(h, size, depth, causal=True)
        # The loss needs more than bfloat16's eight bits.
        return keras.Model(inputs, keras.layers.Dense(256, dtype="float32")(h))

    return QualityTask(
        make_model,
        *split(windows[:, :-1], windows[:, 1:], held_out, held_out),
        batch_size=batch,
        parts=parts,
        steps=steps,
        score="loss",
    )


class Tuning:
    """What is tried of one optimizer.

    Args:
        name: String.
        path: Where the runs are kept.
        end: Time after which no run starts.
        task: `QualityTask`.
    """

    def __init__(self, name, path, end, task):
        from benchmarks import quality_rivals
        from benchmarks.training import Trainer

        self._rival = quality_rivals.RIVALS[name]
        self._path, self._end = path, end
        self._trainer = Trainer(task, self._rival.make, self._rival.traced)
        self.runs = []

    def loss(self, rate, momentum=None, seed=0, **settings):
        """The lowest validation loss of a run; none has two."""
        key = {"rate": rate, "momentum": momentum, "seed": seed, **settings}
        for run in self.runs:
            if run["key"] == key:
                return run["lowest"]
        if time.time() > self._end:
            raise TimeoutError
        if momentum is not None:
            settings[self._rival.momentum] = momentum
        decays = [name for name in self._rival.tuned if "decay" in name]
        settings = {**dict.fromkeys(decays, 0.1), **settings}
        start = time.time()
        run = self._trainer.run(rate, seed, **settings)
        self.runs.append(
            {
                "key": key,
                "lowest": run.lowest,
                "validation": [round(loss, 5) for loss in run.validation],
                "seconds": round(time.time() - start, 2),
            }
        )
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.runs))
        temporary.replace(self._path)
        print(self._path.stem, self.runs[-1], flush=True)
        return run.lowest

    def all(self, centre):
        """Learning rates around a centre, other momentum, fresh seeds."""
        losses = {o: self.loss(centre * 2.0**o) for o in (0, 1, -1)}
        while True:
            best = min(losses, key=losses.get)
            new = [o for o in (best - 1, best + 1) if o not in losses]
            if not new or len(losses) > 5:
                break
            losses[new[0]] = self.loss(centre * 2.0 ** new[0])
        rate = centre * 2.0**best
        momentums = {None: losses[best]}
        for other in self._rival.others:
            momentums[other] = self.loss(rate, other)
        momentum = min(momentums, key=momentums.get)
        for seed in FRESH_SEEDS:
            self.loss(rate, momentum, seed)
        if "factor_damping" in self._rival.tuned:
            # Without its factors.
            for octave in (0, 1, -1):
                self.loss(rate * 2.0**octave, momentum, factor_damping=1e6)


def measure(name, folder, end, tiny):
    """Try one optimizer, in this process."""
    import jax

    from benchmarks.common import machine

    if not tiny and jax.default_backend() == "cpu":
        raise SystemExit("No GPU for JAX. `--tiny` is a trial on a CPU.")
    (folder / "machine.json").write_text(json.dumps(machine()))
    task = make_task(**TINY, steps=2, parts=2) if tiny else make_task(**SIZES)
    tuning = Tuning(name, folder / f"{name}.json", end, task)
    try:
        tuning.all(RIVALS[name])
    except TimeoutError:
        print(f"{name}: out of time", flush=True)


def collected(folder, level):
    """What all processes found, `None` if that is nothing."""
    found = {
        name: json.loads(path.read_text())
        for name in RIVALS
        if (path := folder / f"{name}.json").exists()
    }
    if not found:
        return None
    return {
        "level": level,
        "date": datetime.date.today().isoformat(),
        **json.loads((folder / "machine.json").read_text()),
        "optimizers": found,
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
    parser.add_argument("--optimizer", choices=RIVALS)
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
                env={**os.environ, "PYTHONPATH": _path()},
            )
            for rival in RIVALS
        ]
        codes = [process.wait() for process in processes]
        results = collected(folder, level)
    if results:
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1) + "\n"
        (target / "quality.json").write_text(text)
    sys.exit(any(codes))


def _path():
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    return os.pathsep.join(path for path in paths if path)


if __name__ == "__main__":
    main()
