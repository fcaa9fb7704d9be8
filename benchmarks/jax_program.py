"""The program that JAX compiles of a model's training step."""

import jax


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


def compiled_step(model, x, y):
    """The compiled training step of a compiled model, for one batch."""
    data = x, y, None
    model._symbolic_build(data_batch=data)
    # As `make_train_function` does it.
    step = jax.jit(model.train_step, donate_argnums=0)
    return step.lower(state_of(model), data).compile()
