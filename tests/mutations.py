"""Break the package in small ways, one at a time, and see which test notices.

    python tests/mutations.py [--only NUMBER ...]

Most of them run on PyTorch, where the tests are fastest. Works on copies in a
temporary folder. A mutation that no test notices, a survivor, is a test that is
missing. Not part of the suite: it takes half an hour.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 600

UPDATES = "optimizer/updates.py"
MIXIN = "optimizer/update_mixin.py"
ARGUMENTS = "optimizer/arguments.py"
AVERAGING = "optimizer/averaging.py"
SCHEDULES = "optimizer/schedules.py"
MEASURING = "optimizer/measuring.py"
STATE = "optimizer/state.py"
RULE = "optimizer/update_rule.py"
SQUARES = "optimizer/update_rms.py"
MUON = "optimizer/adafisher_muon.py"
ORTHOGONAL = "optimizer/orthogonal.py"
ORTHOGONALIZATION = "optimizer/orthogonalization.py"
STORE = "factors/store.py"
BLOCK = "factors/block_factors.py"
FACTORS = "factors/normalization.py"
HOOKS = "integration/keras_hooks.py"
JAX_HOOKS = "integration/jax_hooks.py"
TAPE_HOOKS = "integration/tensorflow_hooks.py"
STATISTICS = "statistics.py"
SEGMENTS = "factors/segments.py"
PROBE = "probe/probe.py"
PROBES = "probe/variables.py"
TORCH_PROBE = "probe/torch.py"
TAPE_PROBE = "probe/tensorflow.py"
TAPES = "steps/passes.py"
STEPS = "steps/step.py"
WRAPPER = "wrappers/base.py"
UPDATE = "optimizer/torch_update.py"
DIAGONALS = "optimizer/torch_diagonals.py"
TORCH = "backend/torch.py"
COMMON = "backend/common.py"


@dataclasses.dataclass
class Mutation:
    """One change of one file, and the tests that ought to notice it."""

    file: str
    old: str
    new: str
    tests: str
    backend: str = "torch"


MUTATIONS = [
    # The update rule.
    Mutation(
        UPDATE,
        "torch._foreach_lerp_(momentums, gradients, 1 - self.beta)",
        "torch._foreach_lerp_(momentums, gradients, self.beta)",
        "test_optimizer",
    ),
    Mutation(
        UPDATE,
        "return 1 / (1 - self.beta ** (step + 1 if self.nesterov else step))",
        "return 1.0",
        "test_optimizer",
    ),
    Mutation(
        DIAGONALS,
        "self._dampings = (scales * damping).unbind()",
        "self._dampings = (2 * scales * damping).unbind()",
        "test_optimizer",
    ),
    Mutation(
        DIAGONALS,
        "own[:] = place",
        "own[:] = 0",
        "test_torch_update",
    ),
    Mutation(
        DIAGONALS,
        "found = torch._foreach_addcmul(dampings, first, second)",
        "found = torch._foreach_mul(first, second)",
        "test_torch_update",
    ),
    Mutation(
        UPDATE,
        "denominator = torch._foreach_sqrt(velocity)",
        "denominator = torch._foreach_abs(velocity)",
        "test_optimizer",
    ),
    Mutation(
        UPDATE,
        "values, momentums, denominators, value=-size",
        "values, momentums, denominators, value=size",
        "test_optimizer test_golden",
    ),
    Mutation(
        UPDATE,
        "step + 1 if self.nesterov else step",
        "step",
        "test_optimizer",
    ),
    Mutation(
        UPDATE,
        "momentum, gradient, 1 - self.beta",
        "momentum, gradient, 0.0",
        "test_optimizer",
    ),
    Mutation(
        SQUARES,
        "return (root + epsilon) / (scale * weight**0.5)",
        "return root + epsilon",
        "test_optimizer",
    ),
    Mutation(
        SQUARES,
        "return (update < interval) | (update % interval < within)",
        "return update % interval < within",
        "test_optimizer",
    ),
    Mutation(
        UPDATE,
        "torch._foreach_clamp_min_(steps, -1)",
        "",
        "test_optimizer",
    ),
    Mutation(
        UPDATE,
        "torch._foreach_clamp_max_(steps, 1)",
        "",
        "test_optimizer",
    ),
    Mutation(
        RULE,
        "return ops.minimum(ops.maximum(step, -1.0), 1.0)",
        "return step",
        "test_torch_update",
    ),
    Mutation(
        UPDATE,
        "roots = [gradient.numel() ** 0.5 for gradient in gradients]",
        "roots = [1.0 for gradient in gradients]",
        "test_optimizer",
    ),
    Mutation(
        SQUARES,
        "return ops.where(is_usable, average, old)",
        "return average",
        "test_faults",
    ),
    Mutation(
        SQUARES,
        "return x1 if condition else x2",
        "return x2",
        "test_optimizer",
    ),
    Mutation(
        RULE,
        "weight = 1 - beta * (1 - weight)",
        "pass",
        "test_torch_update",
    ),
    Mutation(
        UPDATES,
        "rate = rate * ops.sqrt(1 - ops.power(decay, step))",
        "rate = rate * (1 - ops.power(decay, step))",
        "test_torch_update",
    ),
    Mutation(
        FACTORS,
        "return x / mean",
        "return x / ops.square(mean)",
        "test_optimizer",
    ),
    Mutation(
        STORE,
        "x = backend.filled(x, self._is_bias_input, 1.0)",
        "x = backend.filled(x, self._is_bias_input, 0.0)",
        "test_optimizer",
    ),
    Mutation(
        UPDATE,
        "size *= (1 - self.adam_beta_2 ** self._step_now()) ** 0.5",
        "size *= 1 - self.adam_beta_2 ** self._step_now()",
        "test_optimizer",
    ),
    Mutation(
        RULE,
        "return step if step > 0 else 2**31",
        "return step",
        "test_long_run",
    ),
    Mutation(
        RULE,
        "backend.filled(step, step <= 0, 2.0**31)",
        "step",
        "test_long_run",
        backend="jax",
    ),
    Mutation(
        RULE,
        "return backend.lerp(average, gradient, 1 - beta)",
        "return backend.lerp(average, gradient, beta)",
        "test_torch_update",
    ),
    Mutation(
        UPDATES,
        "return self._fishers[index]() + self.damping",
        "return self._fishers[index]()",
        "test_optimizer",
    ),
    Mutation(
        UPDATES,
        "return new, update_rule.momentum(new, gradient, self.beta)",
        "return new, new",
        "test_torch_update",
    ),
    # Orthogonalized steps.
    Mutation(
        ORTHOGONAL,
        "number = entries[key] // largest[kernel.keeps_root]",
        "number = entries[key] // largest[False]",
        "test_adafisher_muon",
    ),
    Mutation(
        ORTHOGONALIZATION,
        'LONGEST_STAGE = {"float16": 3, "bfloat16": 1}',
        'LONGEST_STAGE = {"float16": 8, "bfloat16": 8}',
        "test_orthogonalization",
    ),
    Mutation(
        ORTHOGONALIZATION,
        "return ops.rsqrt(damped / ops.mean(damped, axis=-1, keepdims=True))",
        "return ops.rsqrt(damped)",
        "test_orthogonalization",
    ),
    Mutation(
        ORTHOGONALIZATION,
        "return o * (self.scales * bound)",
        "return o * bound",
        "test_orthogonalization",
    ),
    Mutation(
        ORTHOGONALIZATION,
        "damped = grams + ROOT_DAMPING / side",
        "damped = grams + 0 / side",
        "test_orthogonalization",
    ),
    Mutation(
        TORCH,
        "if all(x.untyped_storage().data_ptr() == storage for x in tensors):",
        "if True:",
        "test_torch",
    ),
    Mutation(
        ORTHOGONAL,
        "return max(1.0, self._outputs / self._inputs) ** 0.5",
        "return 1.0",
        "test_adafisher_muon",
    ),
    Mutation(
        ORTHOGONAL,
        "return interval == 1 or (update + 1) % interval == 0",
        "return interval == 1 or update % interval == 0",
        "test_adafisher_muon",
    ),
    Mutation(
        ORTHOGONAL,
        "found.update(batch.directions(step, interval))",
        "found.update(batch.directions(step, 1))",
        "test_adafisher_muon",
    ),
    Mutation(
        MUON,
        "weights = mean_scaled(factors[0].activation)",
        "weights = 1 + 0 * factors[0].activation",
        "test_adafisher_muon",
    ),
    Mutation(
        MUON,
        "weights = backend.filled(weights, ops.max(weights) < 1, 1.0)",
        "pass",
        "test_adafisher_muon",
    ),
    Mutation(
        MUON,
        "return ops.maximum(evenness, (full_size / size) ** 0.5)",
        "return (full_size / size) ** 0.5",
        "test_adafisher_muon",
    ),
    Mutation(
        MUON,
        "return ops.maximum(evenness, (full_size / size) ** 0.5)",
        "return evenness",
        "test_adafisher_muon",
    ),
    Mutation(
        MUON,
        "full_size = max(LARGEST_FULL_SIZE, rows * FULL_SIZE_SHARE)",
        "full_size = LARGEST_FULL_SIZE",
        "test_adafisher_muon",
    ),
    Mutation(
        MUON,
        "return learning_rate * self.adam_lr_ratio",
        "return learning_rate",
        "test_adafisher_muon",
    ),
    Mutation(
        UPDATES,
        "if index not in directions:",
        "if True:",
        "test_adafisher_muon",
        "jax",
    ),
    Mutation(
        ORTHOGONAL,
        "within=self._settings.kernel_update_steps",
        "within=1",
        "test_adafisher_muon",
    ),
    Mutation(
        MEASURING,
        "and orthogonal.moves_at(update) is True",
        "and False",
        "test_adafisher_muon",
        "jax",
    ),
    # When it is measured.
    Mutation(
        MEASURING,
        "return self._is_measuring(backend.step_number(self._iterations))",
        "return self._is_measuring(backend.step_number(self._iterations) + 1)",
        "test_optimizer",
    ),
    Mutation(
        MEASURING,
        "% self.factor_update_steps == 0",
        "% self.factor_update_steps == 1",
        "test_optimizer",
    ),
    Mutation(
        MEASURING,
        "return step // self.gradient_accumulation_steps",
        "return step",
        "test_optimizer",
    ),
    Mutation(
        MEASURING,
        "is_last = (step + 1) % count == 0",
        "is_last = step % count == 0",
        "test_optimizer",
    ),
    Mutation(
        MEASURING,
        "scale = self._loss_scale_now() * count",
        "scale = self._loss_scale_now()",
        "test_optimizer",
    ),
    Mutation(
        TORCH,
        "known[1] == value._version",
        "True",
        "test_torch_counter test_saving",
    ),
    Mutation(
        STATE,
        "        if len(names) == len(self.variables):",
        "        if False:",
        "test_faults",
    ),
    Mutation(
        TORCH_PROBE,
        "any(o.measures_factors() for o in optimizers)",
        "all(o.measures_factors() for o in optimizers)",
        "test_sharing",
    ),
    Mutation(
        TORCH_PROBE,
        "parameter = own_tensor(variable)",
        "parameter = variable.value",
        "test_torch",
    ),
    Mutation(
        TORCH,
        "share = norm.numel() / x.numel()",
        "share = 1 / x.numel()",
        "test_torch",
    ),
    Mutation(
        WRAPPER,
        "if any(map(steps.may_measure, self.probes)):",
        "if True:",
        "test_wrapping",
    ),
    Mutation(
        TORCH_PROBE,
        "        if not gradients:\n            return None",
        "        if not gradients:\n            return earlier",
        "test_torch test_optimizer test_faults",
    ),
    Mutation(
        TORCH_PROBE,
        "        self.answer = None\n        self.tensor.grad",
        "        self.tensor.grad",
        "test_torch test_optimizer",
    ),
    Mutation(
        STEPS,
        "            if optimizer in probe.optimizers:",
        "            if True:",
        "test_sharing",
        "tensorflow",
    ),
    Mutation(
        "integration/compile_hook.py",
        "            if not any(adafisher is other for other in staying):",
        "            if False:",
        "test_sharing test_hooks",
    ),
    # The factors' formulas.
    Mutation(
        FACTORS,
        "return (1.0 - gamma_1) * average + gamma_2 * value",
        "return gamma_1 * average + gamma_2 * value",
        "test_factors",
    ),
    Mutation(
        FACTORS, "return (x - low) / span", "return x / span", "test_factors"
    ),
    Mutation(
        FACTORS,
        "span = high - low + epsilon",
        "span = high - low",
        "test_factors",
    ),
    Mutation(
        FACTORS,
        "ops.where(span > _SMALLEST_NORMAL, span, ops.ones_like(span))",
        "span",
        "test_factors test_faults",
    ),
    Mutation(
        BLOCK,
        "[[bias_input, activation], *([name] for name in others)]",
        "[[bias_input], [activation], *([name] for name in others)]",
        "test_properties test_wrapper_dense",
    ),
    Mutation(
        STORE,
        "ops.isfinite(means)",
        "means > -1",
        "test_factor_store",
    ),
    Mutation(
        STORE,
        "divisors = backend.filled(calls, calls <= 0, 1.0)",
        "divisors = ops.ones_like(calls)",
        "test_sharing",
    ),
    Mutation(
        STORE,
        "(scale**2 - 1)",
        "(scale - 1)",
        "test_optimizer",
    ),
    Mutation(
        STORE,
        "is_usable = ops.logical_and(is_possible, is_used)",
        "is_usable = is_used",
        "test_faults",
    ),
    Mutation(
        STORE,
        "epsilons = epsilon * self._epsilon_scales if epsilon else None",
        "epsilons = epsilon + 0 * self._epsilon_scales if epsilon else None",
        "test_properties test_golden",
    ),
    Mutation(
        STORE,
        '["gradient" in names[-1] for _, names in segments]',
        "[True for _, names in segments]",
        "test_optimizer test_factor_store",
    ),
    Mutation(
        STORE,
        "np.append(firsts, len(blocks_of_segments) + firsts)",
        "np.append(firsts, firsts)",
        "test_factor_store",
    ),
    Mutation(
        MIXIN,
        "entries = start + np.arange(math.prod(own_shape))",
        "entries = np.arange(math.prod(own_shape))",
        "test_mean_squares test_optimizer",
        backend="jax",
    ),
    Mutation(
        BLOCK,
        "is_same = all(x is y for x, y in zip(operands, factors, strict=True))",
        "is_same = True",
        "test_mean_squares",
        backend="jax",
    ),
    Mutation(
        BLOCK,
        "self._operands = None if self._terms else operands",
        "self._operands = operands",
        "test_mean_squares",
        backend="jax",
    ),
    Mutation(
        STORE,
        "of_blocks[number].append(segment)",
        "of_blocks[number] = [segment]",
        "test_factor_store test_faults",
    ),
    Mutation(
        STORE,
        "        if self._uses is not None:",
        "        if False:",
        "test_sharing test_wrapper_embedding",
    ),
    Mutation(
        STORE,
        "ops.any(weight != 0)",
        "ops.any(weight == weight)",
        "test_uncalled_layers test_unfactored_layers test_factor_store",
    ),
    Mutation(
        TORCH,
        'if views.get("of") is not value:',
        'if "of" not in views:',
        "test_torch",
    ),
    Mutation(
        "backend/tensorflow.py",
        "* (2 / size)",
        "/ size",
        "test_optimizer",
        backend="tensorflow",
    ),
    Mutation(
        TORCH,
        "for part in parts[1:]:",
        "for part in parts[2:]:",
        "test_torch",
    ),
    # The arithmetic of padding.
    Mutation(
        STATISTICS,
        "outputs = (size - reach - 1) // stride + 1",
        "outputs = (size - reach) // stride + 1",
        "test_wrapper_conv",
    ),
    Mutation(
        STATISTICS,
        "outputs = (size + stride - 1) // stride",
        "outputs = size // stride",
        "test_wrapper_conv",
    ),
    Mutation(
        STATISTICS,
        "before = reach if causal else _at_least_zero(needed) // 2",
        "before = reach if causal else backend.at_least_zero(needed + 1) // 2",
        "test_wrapper_conv",
    ),
    Mutation(
        STATISTICS,
        "before = reach if causal",
        "before = 0 if causal",
        "test_wrapper_conv_ranks test_properties",
    ),
    Mutation(
        COMMON,
        "is_read = is_read & (starts < outputs * stride)",
        "",
        "test_wrapper_conv",
        "jax",
    ),
    Mutation(
        TORCH,
        "dilation + reach - before - x.shape[axis]",
        "dilation + reach - x.shape[axis]",
        "test_wrapper_conv",
    ),
    Mutation(
        STATISTICS,
        "reach = (kernel_size - 1) * dilation\n    if",
        "reach = kernel_size * dilation\n    if",
        "test_wrapper_conv",
    ),
    Mutation(
        STATISTICS,
        "crop = max(reach - extent, 0) // 2",
        "crop = (max(reach - extent, 0) + 1) // 2",
        "test_wrapper_conv_transpose",
    ),
    Mutation(
        TORCH,
        "x = x.float()\n    return x * x",
        "return (x * x).float()",
        "test_statistics test_optimizer test_wrapper_dense",
    ),
    # Wrapping.
    Mutation(
        STORE,
        "answers = backend.mark_negatives(answers)",
        "answers = ops.relu(answers)",
        "test_factor_store",
    ),
    Mutation(
        STORE,
        "ops.not_equal(means[:, 0], 0.0)",
        "ops.not_equal(means[:, 0], -1.0)",
        "test_optimizer",
    ),
    Mutation(
        STEPS,
        "any(o.trains_only(known) for o in concerned)",
        "True",
        "test_invisible",
        "jax",
    ),
    Mutation(
        JAX_HOOKS,
        "with step.without(hidden):",
        "with step.without(set()):",
        "test_invisible",
        "jax",
    ),
    Mutation(
        TAPE_HOOKS,
        "and _key(probe.trained_parameter) in known",
        "and True",
        "test_tapes",
        "tensorflow",
    ),
    Mutation(
        TAPE_HOOKS,
        "watch(self, [probe.variable.value for probe in probes])",
        "pass",
        "test_tapes",
        "tensorflow",
    ),
    Mutation(
        TAPE_PROBE,
        "if any(origins):",
        "if False:",
        "test_tapes",
        "tensorflow",
    ),
    Mutation(
        TAPE_PROBE,
        "max(read, default=-1) + 1",
        "0",
        "test_tapes test_sharing test_invisible",
        "tensorflow",
    ),
    Mutation(
        TAPE_PROBE,
        "kept = self._answers.pop(replica, [])",
        "kept = []",
        "test_tapes",
        "tensorflow",
    ),
    Mutation(
        TAPE_PROBE,
        "return kept if all(answer.is_known for answer in kept) else []",
        "return kept",
        "test_tapes",
        "tensorflow",
    ),
    Mutation(
        TAPE_PROBE,
        "if not given or not kept:",
        "given = given or [None]\n        if not kept:",
        "test_tapes",
        "tensorflow",
    ),
    Mutation(
        TAPE_PROBE,
        "if not answer.is_read_by(optimizer)",
        "",
        "test_tapes",
        "tensorflow",
    ),
    Mutation(
        TAPES,
        "self._origins.setdefault(graph, {})[tensor.name] = {number}",
        "pass",
        "test_tapes",
        "tensorflow",
    ),
    Mutation(
        TAPES,
        'if tensor.op.type != "Placeholder":',
        "if True:",
        "test_tapes",
        "tensorflow",
    ),
    Mutation(
        TAPE_HOOKS,
        "[] if in_vectorized_map() else _probes_of(sources)",
        "_probes_of(sources)",
        "test_tapes",
        "tensorflow",
    ),
    Mutation(
        TAPE_HOOKS,
        "stack.enter_context(probe.selecting(gradients, optimizer))",
        "pass",
        "test_tapes",
        "tensorflow",
    ),
    Mutation(
        MEASURING,
        "if taken == dropped == 0]",
        "if taken == dropped == -1]",
        "test_invisible",
        "jax",
    ),
    Mutation(
        "integration/compile_hook.py",
        "if not any(adafisher is other for other in staying):",
        "if True:",
        "test_hooks",
    ),
    Mutation(
        TORCH_PROBE,
        "torch.where(is_kept, part, 0.0)",
        "part",
        "test_torch",
    ),
    Mutation(
        UPDATE,
        "self._momentums[index].value.dtype",
        "gradient.dtype",
        "test_torch_update",
    ),
    Mutation(
        STEPS,
        "    if is_for_training and not probe.host.trainable:",
        "    if False:",
        "test_fine_tuning test_wrapping test_probe",
    ),
    Mutation(
        "wrappers/registry.py",
        "    if override is not None:\n        return None",
        "    if False:\n        return None",
        "test_registry",
    ),
    # Large variables in parts.
    Mutation(
        BLOCK,
        "factor[cut] if has_axis else factor",
        "factor",
        "test_factor_store test_torch_update",
    ),
    Mutation(
        UPDATE,
        "(velocity,) = _sliced(cut, velocities)",
        "(velocity,) = _sliced(cut, momentums)",
        "test_torch_update",
    ),
    Mutation(
        "backend/jax.py",
        "jnp.minimum(a[1], b[1]),",
        "jnp.minimum(a[1], a[1]),",
        "test_factor_store",
        "jax",
    ),
    # Before the first step.
    Mutation(
        HOOKS,
        "if not all(layer.built for layer in layers):",
        "if False:",
        "test_hooks",
    ),
    Mutation(
        HOOKS,
        "optimizer.build(model.trainable_variables)",
        "pass",
        "test_cost",
        "tensorflow",
    ),
    Mutation(
        "steps/jax.py",
        "id(optimizer): optimizer.measures_factors()",
        "id(optimizer): optimizer.measures_anything()",
        "test_decision_scope test_optimizer",
        "jax",
    ),
    Mutation(
        "backend/jax.py",
        "index = np.append(index, 0 if start else len(vector) - 1)",
        "index = np.append(index, index)",
        "test_cost",
        "jax",
    ),
    Mutation(
        "backend/jax.py",
        '    values[:1] = np.finfo("float32").tiny\n',
        "",
        "test_cost",
        "jax",
    ),
    Mutation(
        AVERAGING,
        "backend.unshare(variable)",
        "pass",
        "test_optimizer",
        "jax",
    ),
    Mutation(
        AVERAGING,
        "1 / (1 + AVERAGED_SHARE * step)",
        "1 / (2 + AVERAGED_SHARE * step)",
        "test_optimizer",
    ),
    Mutation(
        SCHEDULES,
        "update_rule.past_the_largest(step + 1) - 1",
        "step",
        "test_schedules",
    ),
    Mutation(
        ARGUMENTS,
        "if self.name not in _arguments_of(type(instance)):",
        "if False:",
        "test_bad_input",
    ),
    Mutation(
        AVERAGING,
        "step = step % (",
        "step = step + 0 * (",
        "test_optimizer",
    ),
    Mutation(SEGMENTS, "places < length", "places <= length", "test_segments"),
    Mutation(
        SEGMENTS,
        "np.minimum(places, length - 1)",
        "np.minimum(places, 0)",
        "test_segments",
    ),
    Mutation(SEGMENTS, "total * is_chunk", "total", "test_segments"),
    Mutation(
        SEGMENTS, "start += length", "start += length - 1", "test_segments"
    ),
]


def copy_package(folder):
    """What the tests need, without files that they don't."""
    for name in ("keras_adafisher", "tests", "examples", "benchmarks"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__", "results"),
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)


def mutate(mutation, folder):
    path = folder / "keras_adafisher" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.file} has {text.count(mutation.old)} times: "
            f"{mutation.old}"
        )
    path.write_text(text.replace(mutation.old, mutation.new))


def passes(tests, backend, folder):
    """Whether all tests of some files pass in a folder."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x"),
            *("-p", "no:cacheprovider", "-k", "not killed"),
            *(f"tests/{name}.py" for name in tests),
        ],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "KERAS_BACKEND": backend,
            # Some are noticed by a few of the random cases only.
            "ADAFISHER_CASES": "300",
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if result.returncode not in (0, 1):
        raise RuntimeError(result.stdout + result.stderr)
    return result.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*")
    numbers = parser.parse_args().only or range(len(MUTATIONS))
    survivors = []
    # A test that fails anyway notices nothing.
    for backend in sorted({MUTATIONS[number].backend for number in numbers}):
        tests = {
            name
            for number in numbers
            for name in MUTATIONS[number].tests.split()
            if MUTATIONS[number].backend == backend
        }
        with tempfile.TemporaryDirectory() as folder:
            copy_package(pathlib.Path(folder))
            if not passes(sorted(tests), backend, pathlib.Path(folder)):
                sys.exit(f"Tests fail without a mutation on {backend}.")
    for number in numbers:
        mutation = MUTATIONS[number]
        with tempfile.TemporaryDirectory() as folder:
            copy_package(pathlib.Path(folder))
            mutate(mutation, pathlib.Path(folder))
            survived = passes(
                mutation.tests.split(), mutation.backend, pathlib.Path(folder)
            )
        if survived:
            survivors.append(number)
        verdict = "SURVIVED" if survived else "noticed"
        print(
            f"{number:2} {verdict:8} {mutation.file}: "
            f"{mutation.new.strip() or 'deleted: ' + mutation.old.strip()}",
            flush=True,
        )
    print(f"{len(numbers)} mutations, {len(survivors)} survivors: {survivors}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
