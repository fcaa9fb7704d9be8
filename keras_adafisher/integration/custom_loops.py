"""`training_step`: what makes a function of one's own a training step.

Whether a step measures can be decided in two places, `decision_scope()`:

- "layer": each tap has a condition of its own, in the forward and in the
  backward pass, and so has the optimizer's update. The step is in the program
  once.
- "step": there is one condition around the whole step. It is in the program
  twice, with taps that measure in any case and without taps. It takes twice as
  long to compile. But on an accelerator, the host waits for the device at each
  condition, and no operations before and behind one are fused.

So "step" is for accelerators, and "layer" for CPUs, where compiling takes
longer and conditions cost next to nothing.
"""

import functools
from collections.abc import Callable
from os import environ
from typing import Any
from typing import Literal
from typing import TypeVar

import keras

from keras_adafisher import backend
from keras_adafisher.optimizer import AdaFisher
from keras_adafisher.steps import run
from keras_adafisher.steps import Step

_Function = TypeVar("_Function", bound=Callable[..., Any])

_SCOPES = ("auto", "layer", "step")
_scope: Any = environ.get("ADAFISHER_DECISION_SCOPE", "auto")


def set_decision_scope(scope: Literal["auto", "layer", "step"]) -> None:
    """Say where is decided whether a training step measures.

    The environment variable `ADAFISHER_DECISION_SCOPE` does the same. It takes
    effect where a step is traced: compile the model after it.

    Args:
        scope: "step", one condition around the whole training step; "layer",
            one in each layer; or "auto", which is "step" on accelerators and
            "layer" on CPUs. On PyTorch, which runs eagerly, Python decides
            in any case.

    Raises:
        ValueError: `scope` is anything else.
    """
    global _scope
    if scope not in _SCOPES:
        raise ValueError(
            f"Argument `scope` must be one of {_SCOPES}. "
            f"Received: scope={scope}"
        )
    _scope = scope


def decision_scope() -> Literal["layer", "step"]:
    """Where is decided whether a training step measures.

    Returns:
        "step" or "layer": see `set_decision_scope`.

    Raises:
        ValueError: `ADAFISHER_DECISION_SCOPE` is something else.
    """
    if _scope not in _SCOPES:
        raise ValueError(
            "Environment variable `ADAFISHER_DECISION_SCOPE` must be one of "
            f"{_SCOPES}. Received: {_scope}"
        )
    if _scope == "auto":
        return "step" if backend.has_accelerator() else "layer"
    return _scope


def training_step(
    *optimizers: keras.optimizers.Optimizer,
) -> Callable[[_Function], _Function]:
    """Decorator that makes a function a training step of custom loops.

    Inside of the function, the layers of wrapped models measure. Outside of
    it, a wrapped model measures nothing. It has the variables of a plain one,
    also inside of the function, but on JAX.

    TensorFlow, where the decorator goes inside of `tf.function`. Gradients
    have to be computed by `tf.GradientTape.gradient`, in the function that
    applies them, not in another `tf.function`, a loop or a branch of
    TensorFlow's inside of it.

    ```python
    @tf.function
    @keras_adafisher.training_step(optimizer)
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss
    ```

    JAX, where it goes inside of `jax.jit`. The function takes and returns the
    values of the plain model's trainable variables, as a list or a tuple, and
    those of `optimizer.variables`, somewhere among its arguments. (Of several
    optimizers with variables of equal shapes, in the optimizers' order.) Inside
    of it, the model's `trainable_variables` (and `trainable_weights`) end with
    the small variables through which the statistics reach the optimizer. Those
    of parts of what it trains don't.

    ```python
    @jax.jit
    @keras_adafisher.training_step(optimizer)
    def train_step(state, x, y):
        trainable, non_trainable, optimizer_variables = state
        (loss, non_trainable), gradients = gradient_fn(
            trainable, non_trainable, x, y
        )
        trainable, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, gradients, trainable
        )
        return loss, (trainable, non_trainable, optimizer_variables)
    ```

    On JAX, a step applies an optimizer once: whether it measures is decided
    by the state that it is called with.

    On PyTorch, nothing needs to be decorated, and the function is returned as
    it is.

    Args:
        *optimizers: The optimizers that the function applies, one at least:
            `AdaFisher`s, `keras.optimizers.LossScaleOptimizer`s and
            `MultiOptimizer`s with one in them, or others, for which the
            function is what it was.

    Returns:
        The decorator.

    Raises:
        TypeError: There is no optimizer, or something else. On JAX, when the
            function is called: with "step" for `decision_scope()`, what it
            returns on steps that measure isn't like what it returns on others.
        ValueError: On JAX, when the function is called: an optimizer isn't
            built, or the values of its variables, or of those that it trains,
            aren't among the arguments.
    """
    for optimizer in optimizers or [None]:
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                "`training_step` takes the optimizers that the step applies: "
                "`@keras_adafisher.training_step(optimizer)`. "
                f"Received: {optimizer} (of type {type(optimizer)})"
            )

    def decorate(function):
        @functools.wraps(function)
        def step(*args, **kwargs):
            return run_step(function, optimizers, args, kwargs)

        return step

    if keras.backend.backend() == "torch":
        return lambda function: function
    return decorate


def run_step(function, optimizers, args=(), kwargs=None):
    """Call a function as a training step.

    Args:
        function: Callable.
        optimizers: List of Keras optimizers.
        args: Tuple, its arguments.
        kwargs: Dict, its keyword arguments.

    Returns:
        What the function returns.
    """
    optimizers = [o for o in optimizers if any(adafishers(o))]
    if not optimizers:
        return function(*args, **(kwargs or {}))
    # A `MultiOptimizer` builds those only that it has parameters for.
    inner = [
        adafisher
        for optimizer in optimizers
        for adafisher in adafishers(optimizer)
        if adafisher.built or not optimizer.built
    ]
    return run(
        functools.partial(Step, inner),
        inner,
        optimizers,
        function,
        args,
        kwargs or {},
        decision_scope() == "step",
    )


def choice_of(optimizer):
    """The function by which a `MultiOptimizer` has yet to choose optimizers.

    Args:
        optimizer: `keras.optimizers.Optimizer`, a `MultiOptimizer` or a
            `LossScaleOptimizer` around one perhaps.

    Returns:
        Callable from a variable to its optimizer, which may make a new one each
        time; `None` for other optimizers, and where all are known.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    # Not public: what it asks for each variable's optimizer when it is built.
    choose = getattr(optimizer, "_optimizer_map", None)
    return choose if callable(choose) and not optimizer.optimizers else None


def adafishers(*optimizers):
    """The AdaFishers that optimizers are or contain, one after another.

    Args:
        *optimizers: `keras.optimizers.Optimizer`s. `None` has none.
    """
    for optimizer in optimizers:
        if optimizer is None:
            continue
        if isinstance(optimizer, AdaFisher):
            yield optimizer
        # Of `LossScaleOptimizer` and of `MultiOptimizer`.
        inner = getattr(optimizer, "inner_optimizer", None)
        several = getattr(optimizer, "optimizers", None) or []
        for other in (inner, *several):
            yield from adafishers(other)
