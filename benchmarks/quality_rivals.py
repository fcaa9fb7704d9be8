"""The optimizers of the quality benchmark, and how much each is tried.

Ours and those that are close to them are tried most. Of the others, and on the
tasks that take longest, there are fewer rates and seeds.
"""

import dataclasses
import functools

from benchmarks.common import published

import keras  # isort: skip

import keras_adafisher  # isort: skip


@dataclasses.dataclass(frozen=True)
class Rival:
    """An optimizer.

    Attributes:
        make: Function that makes it with its defaults.
        centre: Float, the learning rate that tuning starts around: where small
            models of its kind are trained best, as former runs and its authors
            have it.
        momentum: Name of the attribute that tuning varies too, and
        others: the values that it tries next to the default.
        decays: The values of `weight_decay` that tuning tries next to that of
            `tuned`.
        tuned: Dict from an attribute to its value in comparisons of tuned
            optimizers. At their defaults, all is as constructors have it.
        program: The rival that is the same program but for such values.
        effort: "much", "some" or "little".
        schedule: "cosine" or "constant".
        forms: Dict from a task to arguments of `make` that make a step take
            less, or the run end lower. Tuning tries both.
    """

    make: object
    centre: float
    momentum: str = None
    others: tuple = ()
    decays: tuple = ()
    tuned: dict = dataclasses.field(default_factory=dict)
    program: str = None
    effort: str = "much"
    schedule: str = "cosine"
    forms: dict = dataclasses.field(default_factory=dict)

    @property
    def traced(self):
        """What a run may change without compiling the program again."""
        names = set(self.tuned) | ({self.momentum} if self.momentum else set())
        return tuple(sorted(names))


# As ours have it by default. Nadam and Muon have next to none, and AdamW 0.004.
# Both are tried: AdaFisherMuon's default for kernels is 0.2.
DECAY, OTHER_DECAY = {"weight_decay": 0.1}, {"weight_decay": 0.2}
# Where fresh roots end lowest and take longest next to all else in a step. All
# but "raw" was tried before, on other seeds: docs/quality_diary.md.
FORMS = {
    task: {"keep_roots": False, "kernel_update_steps": 4}
    for task in ("large", "raw", "diabetes", "cancer", "digits")
}
RIVALS = {
    "AdaFisherMuon": Rival(
        keras_adafisher.AdaFisherMuon,
        4e-2,
        "beta",
        (0.8,),
        (0.1,),
        {**OTHER_DECAY, "adam_weight_decay": 0.1, "factor_damping": 1.0},
        forms=FORMS,
    ),
    "AdaFisherW": Rival(
        keras_adafisher.AdaFisherW, 1e-2, "beta", (0.8,), (0.2,), DECAY
    ),
    "AdamW": Rival(
        keras.optimizers.AdamW, 1e-2, "beta_1", (0.8,), (0.2,), DECAY
    ),
    "Nadam": Rival(
        keras.optimizers.Nadam, 1e-2, "beta_1", (0.8,), (0.2,), DECAY
    ),
    "Muon": Rival(
        keras.optimizers.Muon,
        1e-2,
        "momentum",
        (0.9,),
        (0.2,),
        {**DECAY, "adam_weight_decay": 0.1},
    ),
    "AdaFisher": Rival(
        keras_adafisher.AdaFisher,
        1e-2,
        "beta",
        (0.8,),
        tuned={"weight_decay": 0.0},
        program="AdaFisherW",
        effort="some",
    ),
    "Adam": Rival(
        keras.optimizers.Adam,
        1e-2,
        "beta_1",
        (0.8,),
        tuned={"weight_decay": 0.0},
        program="AdamW",
        effort="some",
    ),
    # Its default has no momentum, which nobody would use it without. No other
    # value can be traced: Keras looks whether it is zero.
    "SGD": Rival(
        functools.partial(keras.optimizers.SGD, momentum=0.9),
        3e-2,
        effort="little",
    ),
    "Lion": Rival(
        keras.optimizers.Lion, 1e-3, "beta_1", (0.8,), effort="little"
    ),
    # It has no use for a schedule: that is what it is for.
    "ScheduleFreeAdamW": Rival(
        keras.optimizers.ScheduleFreeAdamW,
        1e-2,
        "beta_1",
        (0.8,),
        effort="little",
        schedule="constant",
    ),
    "AdaFisher, as published": Rival(
        published, 1e-3, "beta", (0.8,), effort="little"
    ),
}
# All factors equal: what orthogonalized steps are without AdaFisher's factors.
ABLATION = "AdaFisherMuon, not whitened"
RIVALS[ABLATION] = Rival(
    keras_adafisher.AdaFisherMuon,
    4e-2,
    "beta",
    (0.8,),
    (0.1,),
    tuned={
        **OTHER_DECAY,
        "adam_weight_decay": 0.1,
        "factor_damping": 1e6,
    },
    program="AdaFisherMuon",
    effort="ablation",
    forms=FORMS,
)
MAIN = tuple(name for name, rival in RIVALS.items() if rival.effort == "much")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of a task and an optimizer is measured.

    Attributes:
        rates: Integer, how many learning rates are tried at least, a factor of
            two apart. While the best is at an end, or the last one is still
            within 5 % of it, there is one more,
        more: of so many at most.
        tuning: Integer, how many seeds they are tried on.
        seeds: Integer, the fresh seeds at the rate that was chosen.
        sooner: Integer, those with shorter schedules.
        defaults: Integer, those of each comparison of defaults.
    """

    rates: int
    more: int
    tuning: int
    seeds: int
    sooner: int
    defaults: int


# From how long a task takes and the effort.
PLANS = {
    ("short", "much"): Plan(11, 4, 3, 10, 10, 10),
    ("short", "some"): Plan(11, 4, 3, 10, 0, 10),
    ("short", "little"): Plan(11, 4, 3, 10, 0, 10),
    ("short", "ablation"): Plan(5, 4, 3, 10, 0, 0),
    ("middle", "much"): Plan(11, 3, 3, 10, 5, 10),
    ("middle", "some"): Plan(11, 3, 3, 10, 0, 10),
    ("middle", "little"): Plan(5, 5, 3, 10, 0, 3),
    ("middle", "ablation"): Plan(5, 2, 3, 10, 0, 0),
    ("long", "much"): Plan(5, 5, 3, 10, 5, 3),
    ("long", "some"): Plan(5, 4, 1, 5, 0, 1),
    ("long", "little"): Plan(3, 3, 1, 3, 0, 1),
    ("long", "ablation"): Plan(4, 1, 3, 10, 0, 0),
    ("longest", "much"): Plan(3, 2, 1, 3, 3, 0),
}
# Muon, where its steps take several times as long as all others'.
COSTLY = Plan(4, 2, 3, 10, 5, 1)
