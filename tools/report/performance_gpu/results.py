"""What the benchmark found, and what it is compared with."""

import json

BACKENDS = {"jax": "JAX", "torch": "PyTorch"}
MODELS = {
    "gpt": ("GPT", "12 blocks, 768 wide, 16 × 512 tokens, `mixed_bfloat16`"),
    "vit": ("ViT-S/16", "64 images of 224², `mixed_bfloat16`"),
    "resnet50": ("ResNet50", "64 images of 160², float32"),
    "resnet": ("small ResNet", "15 convolutions, 128 images of 32², float32"),
}
DEFAULT = "AdaFisher, default"
EVERY_100, EVERY_STEP = "AdaFisher, every 100", "AdaFisher, every step"
MUON = "AdaFisherMuon"
OPTIMIZERS = ("SGD", "Muon", DEFAULT, EVERY_100, EVERY_STEP, MUON)

# What is to be at most how much, by backend. The keys are those of `ratios_of`.
GOALS = {
    "jax": {
        DEFAULT: 1.02,
        EVERY_100: 1.01,
        EVERY_STEP: 1.15,
        "peak": 1.01,
        "first": 2.2,
        MUON: 1.1,
        "peak of Muon": 1.03,
        "first of Muon": 1.5,
    },
    "torch": {DEFAULT: 1.03, EVERY_STEP: 1.25, MUON: 1.1},
}


def load(folder):
    """From backend to what was measured, for those that were."""
    return {
        backend: json.loads(path.read_text(encoding="utf-8"))
        for backend in BACKENDS
        if (path := folder / f"gpu-{backend}.json").exists()
    }


def load_compiled(folder):
    """What was compiled without a GPU, `None` if nothing was."""
    path = folder / "programs.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def programs_of(row, kind):
    """From optimizer to one kind of figure, where there is one."""
    return {
        optimizer: facts[kind]
        for optimizer, facts in row.get("programs", {}).items()
        if facts.get(kind) is not None
    }


def quotient(figures, name, base):
    """A ratio, `None` if a part of it wasn't measured."""
    known = name in figures and base in figures
    return figures[name] / figures[base] if known else None


def ratios_of(row):
    """What goals are about, of one model."""
    ratios = {
        optimizer: ratio["median"]
        for optimizer, ratio in row.get("over Adam", {}).items()
    }
    firsts = programs_of(row, "first_seconds")
    peaks = programs_of(row, "peak_bytes")
    return {
        **ratios,
        "first": quotient(firsts, DEFAULT, "Adam"),
        "first of Muon": quotient(firsts, MUON, "Adam"),
        "peak": quotient(peaks, DEFAULT, "SGD"),
        "peak of Muon": quotient(peaks, MUON, "Adam"),
    }


def is_met(backend, key, ratio):
    """Whether a goal is met, `None` if there is none or no figure for it.

    What counts is the figure with the digits that the page shows.
    """
    goal = GOALS[backend].get(key)
    if goal is None or ratio is None:
        return None
    return round(ratio, 3) <= goal
