"""The collectives of a compiled step of JAX."""

import collections
import math
import re

import jax
import keras

from benchmarks.jax_program import state_of
from benchmarks.jax_program import step_of

OPERATIONS = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
}
_SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def count(model, x, y, branch=None):
    """Count the collectives of `model`'s training step.

    Args:
        model: Compiled model. With AdaFisher, trained before.
        x, y: NumPy arrays, one batch.
        branch: Int or `None`. If an int, one condition is around the step, and
            its collectives are those of this branch, 0 for plain steps.

    Returns:
        Dict with `"inside"` and `"outside"`: whether the branch of a condition
        contains them. For each a `Counter` of operations, in which `"bytes"`
        are those that they return, on one device.
    """
    distribution = keras.distribution.distribution()
    batch = [
        jax.device_put(a, distribution.get_data_layout(a.shape).backend_layout)
        for a in (x, y)
    ]
    model.optimizer.build(model.trainable_variables)
    state = state_of(model)
    # As Keras' `fit` compiles it.
    shardings = jax.tree.map(lambda value: value.sharding, state)
    step = jax.jit(
        step_of(model), donate_argnums=0, out_shardings=(None, shardings)
    )
    program = step.lower(state, tuple(batch)).compile().as_text()
    computations, entry = _computations(program)
    counts = {"inside": collections.Counter(), "outside": collections.Counter()}

    def walk(name, place):
        for line in computations.get(name, ()):
            match = re.match(
                r"(?:ROOT )?%[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(", line
            )
            if match is None:
                continue
            operation = match[2].removesuffix("-start")
            if operation in OPERATIONS:
                counts[place][operation] += 1
                counts[place]["bytes"] += _bytes(match[1])
            # That for false first.
            branches = [
                found[1]
                for value in ("false", "true")
                if (
                    found := re.search(value + r"_computation=%([\w.-]+)", line)
                )
            ]
            for names in re.findall(r"branch_computations=\{(.*?)\}", line):
                branches += names.replace("%", "").split(", ")
            if branches and branch is not None:
                walk(branches[branch], "outside")
                branches = []
            for each in branches:
                walk(each, "inside")
            for called in re.findall(
                r"(?:to_apply|calls|body|condition)=%([\w.-]+)", line
            ):
                walk(called, place)

    walk(entry, "outside")
    return counts


def _computations(program):
    computations, entry, lines = {}, None, []
    for line in program.splitlines():
        match = re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line.rstrip())
        if match:
            lines = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        else:
            lines.append(line.strip())
    return computations, entry


def _bytes(shape):
    return sum(
        _SIZES[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )
