"""The update rules as pure functions of tensors, one parameter at a time.

With the gradient `g`, the Fisher diagonal `F = H * S + damping` and the
learning rate `lr`, all element by element:

    as published        m <- beta m + (1 - beta) g
                        theta <- theta - lr * c m / F

    scaled, bounded     v <- decay v + (1 - decay) mean((g / F)²)
                        theta <- theta - lr * clip(c m / F / sqrt(v), -1, 1)

    without factors     v <- beta_2 v + (1 - beta_2) g²
    (AdamW)             theta <- theta - lr * c m / (sqrt(v) + epsilon)

where `c` corrects `m`, and `v`, for having started at zero, and `m` may be
Nesterov's. The steps of `AdaFisherMuon` are in `orthogonalization.py`; what
PyTorch does for lists of parameters is in `torch_update.py`.

Nothing in this file knows about layers or variables.
"""

from keras import ops

from keras_adafisher import backend


def momentum(average, gradient, beta):
    """`m <- beta m + (1 - beta) g`.

    Args:
        average: Tensor, the momentum so far.
        gradient: Tensor like it.
        beta: Float.

    Returns:
        The new momentum. Called once more with it and the same gradient, this
        function gives Nesterov's: the momentum as the next step would have it.
    """
    return backend.lerp(average, gradient, 1 - beta)


def momentums(averages, gradients, beta):
    """`momentum` of each tensor of two lists."""
    return backend.lerp_each(averages, gradients, 1 - beta)


def momentum_correction(beta, step, nesterov):
    """What a momentum is multiplied by, since it started at zero.

    Args:
        beta: Float.
        step: Number of this update, counted from 1.
        nesterov: Bool, whether the momentum is Nesterov's.

    Returns:
        `1 / (1 - beta^step)`, with Nesterov's momentum
        `1 / (1 - beta^(step + 1))`.
    """
    weight = 1 - ops.power(beta, step)
    if nesterov:
        weight = 1 - beta * (1 - weight)
    return 1 / weight


def quotient(m, rate, denominator):
    """A step along `m / F`, or along AdamW's `m / (sqrt(v) + epsilon)`.

    Args:
        m: Tensor, the momentum.
        rate: Scalar tensor, at least in single precision: half precision has no
            room for the learning rate's quotient. All that corrects and scales
            the step, times the learning rate if nothing bounds it.
        denominator: Tensor that broadcasts to `m`.

    Returns:
        Tensor like `m`, what to subtract from the parameter.
    """
    return ops.divide(ops.multiply(m, rate), denominator)


def bounded(step):
    """Bound each entry of a step by 1, before the learning rate multiplies it.

    Were the learning rate the bound, it would enter the step in three places.
    JAX' compiler then lists what the step reads in one order for some
    parameters, in another for others, and compiles a kernel for each.

    Args:
        step: Tensor.

    Returns:
        A tensor like `step`. Ours; the bound is Sophia's (arXiv 2305.14342,
        Section 2.2).
    """
    return ops.minimum(ops.maximum(step, -1.0), 1.0)


def past_the_largest(step):
    """The number of a step, also where the counter ran over.

    JAX and PyTorch count in int32. Past the largest one comes the smallest,
    and a bias correction of a negative step would stop the training. Any large
    number corrects nothing.

    Args:
        step: Integer, or tensor of any dtype, the number counted from 1.
            PyTorch's lists are updated with Python's numbers.

    Returns:
        Integer, or float tensor.
    """
    if isinstance(step, int):
        return step if step > 0 else 2**31
    return backend.filled(step, step <= 0, 2.0**31)
