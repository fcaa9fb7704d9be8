"""JAX' probes: the condition on a request is in the compiled program."""

import jax
import keras
from jax.interpreters.ad import JVPTracer
from keras import ops

from keras_adafisher import steps
from keras_adafisher.backend import constrain_layout
from keras_adafisher.backend.jax import nearly_zeros
from keras_adafisher.probe.probe import Probe


class JaxProbe(Probe):
    """Where one block reports what it measures, on JAX."""

    is_listed = True

    # It is 9e-13: a mean square of 1e4 adds nothing to a gradient's norm of 1
    # in float32, and one of 1e-25 doesn't vanish yet.
    ANSWER_SCALE = 2.0**-40

    def identity(self, z, h, request):
        # Nothing is measured in forward mode, and JAX can't push a tangent
        # through a function with a backward pass of its own. Its name isn't
        # documented, but there is no other way to tell.
        if isinstance(z, JVPTracer):
            return z
        vector = ops.convert_to_tensor(self.variable)
        h = jax.lax.stop_gradient(ops.convert_to_tensor(h, sparse=False))

        def activations():
            return constrain_layout(self.activation_vector(h), self.variable)

        def answer(first, s):
            parts = [self.one_call(first), first, *self.gradient_parts(s)]
            return constrain_layout(self._join(parts), self.variable)

        # The mean squares of `h` are taken in the forward pass: the backward
        # pass may have another form of `h` only, and needn't keep this one
        # alive. They are joined with those of `s` and scaled in the backward
        # pass, where that takes a kernel anyway.
        if request is True:
            first = activations()
        else:
            zeros = nearly_zeros(self.sizes[1])
            first = jax.lax.cond(
                request,
                activations,
                lambda: constrain_layout(zeros, self.variable),
            )

        @jax.custom_vjp
        def identity(z, vector, first, request):
            return z

        def forward(z, vector, first, request):
            return z, (vector, first, request)

        def backward(residuals, s):
            vector, first, request = residuals
            if request is None:
                found = answer(first, s)
            else:
                # Where no answer is wanted, there is the probe itself, which
                # is as good as zero.
                found = jax.lax.cond(
                    request, lambda: answer(first, s), lambda: vector
                )
            return s, found, None, None

        identity.defvjp(forward, backward)
        return identity(z, vector, first, None if request is True else request)

    def answer_in(self, gradients, optimizer):
        # There is a gradient, of zeros, for what isn't used too.
        step = steps.current()
        if step is not None and id(self) not in step.answering:
            return None
        return super().answer_in(gradients, optimizer)

    @staticmethod
    def differentiate(compute_loss, data, probes, variables):
        probed = [probe.variable for probe in probes]
        ids = set(map(id, probed))
        variables = [v for v in variables if id(v) not in ids]

        # All as arguments: XLA would compute with constants while it compiles.
        def loss_of(answers, values, data):
            mapping = [
                *zip(variables, values, strict=True),
                *zip(probed, answers, strict=True),
            ]
            with keras.StatelessScope(mapping, collect_losses=True):
                return compute_loss(*data)

        values = [v.value for v in variables]
        # Compiling all at once takes less than half as long as one by one.
        return jax.jit(jax.grad(loss_of))(
            [v.value for v in probed], values, data
        )
