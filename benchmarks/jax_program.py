"""The program that JAX compiles of a model's training step."""

import os
import re

import jax

import keras_adafisher

# What a program has beside kernels.
NO_KERNELS = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "conditional",
    "copy-start",
    "copy-done",
}
INSTRUCTION = re.compile(r" = (?:\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(")


def state_of(model):
    """What a training step takes and returns, in Keras' order."""
    return tuple(
        [variable.value for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )


def step_of(model):
    """The function that a compiled model's `fit` compiles."""
    return keras_adafisher.training_step(model.optimizer)(model.train_step)


def fit_step(task, optimizer):
    """What `fit` calls for each batch, as a function that JAX can compile.

    Keras' function compiles when it is called, and keeps the program to itself.
    One around it is compiled to the same, and can be asked.

    Args:
        task: `Task`, not compiled.
        optimizer: `keras.optimizers.Optimizer`.

    Returns:
        Function of the model's state, see `state_of`, and a batch.
    """
    task.compile(optimizer)
    model = task.model
    # As `fit` does it before it makes the function.
    optimizer.build(model.trainable_variables)
    model.make_train_function()

    def step(state, data):
        return model.train_function(state, iter([data]))

    return jax.jit(step, donate_argnums=0)


def compiled_step(model, x, y):
    """The compiled training step of a compiled model, for one batch."""
    data = x, y, None
    model._symbolic_build(data_batch=data)
    # As `make_train_function` does it.
    step = jax.jit(step_of(model), donate_argnums=0)
    # The tests do without this code generator, but users don't: without it,
    # there are fewer kernels. (A JAX that isn't told so needn't know it.)
    emitters = "xla_cpu_use_fusion_emitters"
    has_flag = emitters in os.environ.get("XLA_FLAGS", "")
    options = {emitters: True} if has_flag else None
    return step.lower(state_of(model), data).compile(compiler_options=options)


def peak_bytes(program):
    """The memory of a compiled program, by its own analysis.

    All that is there at its peak: arguments, results, and what it makes in
    between. Of two branches, the larger counts.
    """
    found = program.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


def distinct_kernels(program):
    """How many kernels XLA compiles for a program, by its text.

    On a CPU, that is most of what compiling takes. Equal fusions are compiled
    once. Those that a library computes, sums of squares for instance, and
    operations that aren't fused aren't compiled.
    """
    bodies = {
        name: _without_names(body) for name, body in _bodies(program)[0].items()
    }
    kernels = set()
    for line in re.findall(r" fusion\([^\n]*", program):
        if "__ynn_fusion" not in line:
            kernels.add(bodies[re.search(r"calls=(%[\w.-]+)", line)[1]])
    return len(kernels)


def conditionals(program):
    """How many conditions a program has, by its text."""
    return program.count(" conditional(")


def instructions(program, conditional_branch=None):
    """How many instructions a program has, by its text.

    Args:
        program: String.
        conditional_branch: Int or `None`. If an int, only those count that run
            if the program's one condition takes that branch. 0 is for false.
    """
    bodies, entry = _bodies(program)

    def count(name):
        total = 0
        for line in bodies[name].splitlines():
            if " = " not in line:
                continue
            total += 1
            called = [n for n in re.findall(r"%[\w.-]+", line) if n in bodies]
            if " conditional(" in line and conditional_branch is not None:
                called = [_branches(line)[conditional_branch]]
            total += sum(map(count, called))
        return total

    return count(entry)


def started_kernels(program):
    """How many kernels a program of a GPU starts: at least, and at most.

    They differ by the branches of conditionals. A loop counts as one.

    Args:
        program: String.

    Returns:
        Two Ints.
    """
    bodies, entry = _bodies(program)

    def count(name):
        least = most = 0
        for line in bodies[name].splitlines():
            found = INSTRUCTION.search(line)
            kind = found and found[1]
            if kind == "conditional":
                parts = [count(branch) for branch in _branches(line)]
            elif kind == "call":
                parts = [count(re.search(r"to_apply=(%[\w.-]+)", line)[1])]
            else:
                is_kernel = found is not None and kind not in NO_KERNELS
                parts = [(is_kernel, is_kernel)]
            least += min(low for low, _ in parts)
            most += max(high for _, high in parts)
        return least, most

    return count(entry)


def _bodies(program):
    """Dict from a computation's name to its lines, and the first one's name."""
    bodies = {}
    entry = None
    for match in re.finditer(
        r"^(ENTRY )?(%[\w.-]+)[^\n]*\{\n(.*?)^\}", program, re.M | re.S
    ):
        bodies[match[2]] = match[3]
        entry = match[2] if match[1] else entry
    return bodies, entry


def _branches(line):
    """The names of a condition's branches, that for false first."""
    both = re.search(
        r"true_computation=(%[\w.-]+), false_computation=(%[\w.-]+)", line
    )
    if both:
        return both[2], both[1]
    listed = re.search(r"branch_computations=\{([^}]*)\}", line)[1]
    return listed.split(", ")


def _without_names(body):
    body = re.sub(r", (metadata=\{[^}]*\}|backend_config=[^\n]*)", "", body)
    numbers = {}
    return re.sub(
        r"%[\w.-]+", lambda m: str(numbers.setdefault(m[0], len(numbers))), body
    )
