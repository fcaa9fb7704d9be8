"""The program that JAX compiles of a model's training step."""

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


def compiled_step(model, x, y):
    """The compiled training step of a compiled model, for one batch."""
    data = x, y, None
    model._symbolic_build(data_batch=data)
    # As `make_train_function` does it.
    step = jax.jit(step_of(model), donate_argnums=0)
    return step.lower(state_of(model), data).compile()


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
    bodies = {}
    for body in re.findall(r"^%[^\n]*\{\n.*?^\}", program, re.M | re.S):
        name = re.match(r"%[\w.-]+", body)[0]
        bodies[name] = _without_names(body)
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
    bodies = {}
    entry = None
    for match in re.finditer(
        r"^(ENTRY )?(%[\w.-]+)[^\n]*\{\n(.*?)^\}", program, re.M | re.S
    ):
        bodies[match[2]] = match[3]
        entry = match[2] if match[1] else entry

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
    # Its first line has names of another form.
    body = body.split("\n", 1)[1]
    body = re.sub(r", (metadata=\{[^}]*\}|backend_config=[^\n]*)", "", body)
    numbers = {}
    return re.sub(
        r"%[\w.-]+", lambda m: str(numbers.setdefault(m[0], len(numbers))), body
    )


def started_kernels(text):
    """How many kernels a program of a GPU starts: at least, and at most.

    They differ by the branches of conditionals. A loop counts as one.

    Args:
        text: String, the program's.

    Returns:
        Two Ints.
    """
    computations = {}
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if head:
            name = "ENTRY" if head[1] else head[2]
            lines = computations[name] = []
        elif line.startswith("  "):
            lines.append(line)

    def count(name):
        least = most = 0
        for line in computations[name]:
            found = INSTRUCTION.search(line)
            if found is None or found[1] not in ("conditional", "call"):
                is_kernel = found is not None and found[1] not in NO_KERNELS
                least, most = least + is_kernel, most + is_kernel
                continue
            names = re.search(
                r"(?:branch_computations|to_apply|calls)=(.*)", line
            )
            inner = names[1] if names else line[line.index("true_comp") :]
            parts = [
                count(part)
                for part in re.findall(r"%?([\w.-]+)", inner)
                if part in computations
            ]
            least += min(low for low, _ in parts)
            most += max(high for _, high in parts)
        return least, most

    return count("ENTRY")
