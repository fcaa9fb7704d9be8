"""What a training step is.

While a step runs, and only then, layers have taps (`probe/probe.py`). `fit` and
`train_on_batch` make a step of a model's `train_step`
(`integration/keras_hooks.py`), a custom loop decorates its function with
`training_step` (`integration/custom_loops.py`). On PyTorch, nothing has to be
done.

On JAX, the `trainable_variables` of models end with the probes in a step,
because what is differentiated and what the optimizer gets is taken from there.
(Which lists do, `Step.shows` decides.)
"""

import contextlib
import threading

from keras import ops

# Replicas of TensorFlow run in threads of one process, each with its own step.
_running = threading.local()


class AppliedAgain(Exception):
    """An optimizer is applied twice in a step whose condition knows of once."""


class Step:
    """A training step that is under way.

    Args:
        optimizers: List of the AdaFishers that may be applied in it.
        mode: "conditional", where each tap has a condition of its own,
            "measure", where all answers are wanted, or "plain", where none is
            and there are no taps.
        wanted: Dict from the id of an optimizer to a boolean tensor, whether
            its factors are measured in this step. Given where state is passed
            along, and an optimizer's own counter doesn't count: on JAX.
        state: Dict from the id of a variable of an optimizer to its value at
            the beginning of the step, where state is passed along.

    Attributes:
        answering: Dict from its id to each probe that this step requests.
        raises_if_applied_again: Bool. See `count_apply`.
        passes: On TensorFlow the `Passes` so far, `None` if there is none.
    """

    def __init__(self, optimizers, mode="conditional", wanted=None, state=None):
        self.optimizers = list(optimizers)
        self.mode = mode
        self._wanted = wanted
        self._state = state or {}
        self.answering = {}
        self._applied = set()
        self._hidden = frozenset()
        self.raises_if_applied_again = False
        self.passes = None

    def __enter__(self):
        self._outer = current()
        _running.step = self
        return self

    def __exit__(self, *error):
        _running.step = self._outer

    def request_of(self, probe):
        """Whether an answer is wanted: a bool or a boolean tensor."""
        if self.mode == "plain" or id(probe.variable) in self._hidden:
            return False
        wanted = self._is_wanted(probe)
        if wanted is not False:
            self.answering[id(probe)] = probe
            if self.mode == "measure":
                return True
        return wanted

    def probes(self):
        """List of the probes that may answer in this step."""
        found = dict(self.answering)
        # A function that was traced in an earlier step has requested some.
        for optimizer in self.optimizers:
            found.update((id(p), p) for p in optimizer.measuring_probes())
        return list(found.values())

    def shows(self, probe, variables):
        """Whether a list of variables ends with a probe in this step.

        Programs cut the state that is passed along, which has all weights
        before all probes, by the lengths of models' lists. So those that have
        only a part of what an optimizer trains end with none of its probes.

        Args:
            probe: `Probe` of a block with a parameter in the list.
            variables: List of variables.
        """
        known = set(map(id, variables))
        concerned = [o for o in self.optimizers if o in probe.optimizers]
        return not concerned or any(o.trains_only(known) for o in concerned)

    @contextlib.contextmanager
    def without(self, hidden):
        """Context in which nothing is asked of some probes.

        Args:
            hidden: Set of the ids of their variables.
        """
        outer, self._hidden = self._hidden, self._hidden | hidden
        try:
            yield
        finally:
            self._hidden = outer

    def count_apply(self, optimizer):
        """Take notice that an optimizer is applied.

        Raises:
            AppliedAgain: It was already. The step after the next one of the
                optimizer may measure where the next one doesn't.
        """
        if self.raises_if_applied_again and id(optimizer) in self._applied:
            raise AppliedAgain
        self._applied.add(id(optimizer))

    def value_of(self, variable):
        """A variable's value at the beginning of the step."""
        value = self._state.get(id(variable))
        return ops.convert_to_tensor(variable) if value is None else value

    def _is_wanted(self, probe):
        found = []
        for optimizer in self.optimizers:
            if not optimizer.built:
                # It will be, in this step.
                return True
            if optimizer in probe.optimizers:
                found.append(self._is_measuring(optimizer))
        if any(wanted is True for wanted in found) or not self.optimizers:
            return True
        found = [wanted for wanted in found if wanted is not False]
        if not found:
            return False
        first, *others = found
        for other in others:
            first = ops.logical_or(first, other)
        return first

    def _is_measuring(self, optimizer):
        if self._wanted is None:
            return optimizer.measures_factors()
        return self._wanted[id(optimizer)]


def current():
    """The `Step` that this thread runs, or `None`."""
    return getattr(_running, "step", None)


def mode():
    """The mode of this thread's `Step`: "conditional" if there is none."""
    step = current()
    return "conditional" if step is None else step.mode


def request_of(probe):
    """Whether the answer of a probe is wanted: a bool or a boolean tensor."""
    step = current()
    # What is measured for no optimizer is measured for `analysis`.
    is_for_training = step is None or step.optimizers
    if is_for_training and not probe.host.trainable:
        return False
    if step is None:
        return probe.is_requested_outside_of_steps()
    return step.request_of(probe)


def may_measure(probe):
    """Whether a tap may have something to do here. Asks for no answer."""
    step = current()
    if step is not None:
        return step.mode != "plain"
    return probe.host.trainable and probe.is_requested_outside_of_steps()


def run(make_step, inner, optimizers, function, args, kwargs, once):
    """Run a function as a training step.

    Args:
        make_step: Callable that takes the arguments of `Step` behind
            `optimizers`, and makes one.
        inner: List of the AdaFishers that train something, none perhaps.
        optimizers: List of Keras optimizers that are or contain them.
        function: Callable.
        args: Tuple, its arguments.
        kwargs: Dict, its keyword arguments.
        once: Bool. Whether it is decided once whether the step measures.

    Returns:
        What the function returns.
    """
    raise NotImplementedError("A backend that needs steps has its own.")
