"""How a layer's statistics reach the optimizer: as a gradient.

Nothing but a gradient can leave a function that JAX differentiates, so the
statistics leave as one, on all backends. Each factored block owns a *probe*, a
small vector of zeros. In a training step, the block's pre-activation passes
through an identity, the *tap*, that takes this vector as a further input. In
the backward pass the tap returns the statistics as *its* gradient:

    forward    z ───────────────► z, and mean h²
    backward   dL/dz ◄─────────── s = dL/dz
               gradient of the vector  ◄── (1, mean h², mean s²) · 2⁻⁴⁰

Where a layer is called several times, autodiff sums these *answers*, and the
sum of the ones tells how many there were. A layer that isn't called has none.

There are taps in a training step only, and which of them answer, `steps.Step`
says. Anything else, an evaluation for instance, sees the plain layer.

On JAX, answers travel in the list of gradients, where other code may look at
them: it clips by a global norm, or adds a penalty. So they are scaled by a
power of two, which floating point does exactly. They are then too small to be
noticed there, and the optimizer gets back what was measured, bit by bit. On
TensorFlow and PyTorch no list has a probe: a tape is asked for the gradients of
probes beside those of parameters, and a backward pass leaves them on probes.
"""

import math
import weakref

import keras
import numpy as np
from keras import ops

from keras_adafisher import backend
from keras_adafisher import steps


class Probe:
    """Where one block reports what it measures.

    A backend has a subclass, `BackendProbe`, in a file of its own here.

    Args:
        block: The `Block` that measures.
        host: The layer that the block is in.
        name: String, unique among the probes of the layer.

    Attributes:
        size: Int, the length of the vector: one for the number of calls, then
            the entries of `H`, of `S` and, if the bias has an `S` of its own,
            of that.
        sizes: List of ints that add up to `size`, those of these parts.
        variable: `keras.Variable` of shape `(size,)`, which has to be
            differentiated with the parameters. `None` on PyTorch.
        is_listed: Bool, whether lists of variables have it while a training
            step runs.
        optimizers: List of the AdaFishers that have been built for the block,
            of those that are still there.
    """

    is_listed = False

    # What answers are multiplied by on their way, see the top.
    ANSWER_SCALE = 1.0

    # What to do if no layer has reported anything.
    HOW_TO_MEASURE = (
        "In a custom training loop, decorate the step with "
        "`keras_adafisher.training_step(optimizer)`, and differentiate all of "
        "`model.trainable_variables` in it."
    )

    def __init__(self, block, host, name="probe"):
        self.block = block
        self.host = host
        shapes = [
            block.activation_shape,
            block.gradient_shape,
            *filter(None, [block.bias_gradient_shape]),
        ]
        self.sizes = [1, *map(math.prod, shapes)]
        self.size = sum(self.sizes)
        self._references = []
        self.variable = self._make_variable(name)

    def _make_variable(self, name):
        """Make `variable`."""
        parameter = self.block.parameters[0]
        with backend.creation_scope(parameter):
            variable = keras.Variable(
                backend.initializer(0.0),
                shape=(self.size,),
                dtype="float32",
                # Under mixed precision a variable is cast where it is read,
                # and it and its gradient would differ in dtype.
                autocast=False,
                aggregation="only_first_replica",
                layout=backend.replicated_layout(parameter),
                name=name,
            )
        # Keras' own mark for a variable whose "gradient" is no descent
        # direction: no optimizer takes a step along it, or unscales it.
        variable.overwrite_with_gradient = True
        # How an optimizer that is given the variable finds its way back.
        variable.adafisher_probe = self
        return variable

    @property
    def is_seen(self):
        """Whether a tap can be expected to see what the block computes."""
        return not self.block.is_estimated and (
            getattr(self.host, "quantization_mode", None) is None
        )

    @property
    def optimizers(self):
        # On PyTorch, each layer asks at each step. Looking through a weak set
        # takes longer than all else that is asked.
        found = [reference() for reference in self._references]
        return [optimizer for optimizer in found if optimizer is not None]

    def add_optimizer(self, optimizer):
        """Take notice of an AdaFisher that was built for the block."""
        self.remove_optimizer(optimizer)
        self._references.append(weakref.ref(optimizer))

    def remove_optimizer(self, optimizer):
        """Forget an AdaFisher that measures here no more, and those gone."""
        self._references = [
            weakref.ref(other)
            for other in self.optimizers
            if other is not optimizer
        ]

    def tap(self, z, h):
        """Measure the block between its input and its output.

        Args:
            z: Tensor, the block's pre-activation.
            h: Tensor, the activations that the block made `z` from.

        Returns:
            `z`, unchanged.
        """
        request = steps.request_of(self)
        return z if request is False else self.identity(z, h, request)

    def identity(self, z, h, request):
        """An identity in whose backward pass the probe answers.

        Args:
            z, h: See `tap`.
            request: True or boolean tensor, whether an answer is wanted.

        Returns:
            `z`.
        """
        raise NotImplementedError("Each backend has its own.")

    def is_requested_outside_of_steps(self):
        """Whether a tap measures where no training step is known to run."""
        return False

    def answer_in(self, gradients, optimizer):
        """The gradient of the probe.

        Args:
            gradients: Dict from the id of a variable to its gradient: of all
                variables that the optimizer is given.
            optimizer: The AdaFisher that asks.

        Returns:
            Tensor, or `None` if there is none. On PyTorch a list of tensors,
            the parts of the vector.
        """
        answer = gradients.get(id(self.variable))
        return None if answer is None else ops.convert_to_tensor(answer)

    def clear_answer(self):
        """Drop what a backward pass left on the probe."""
        # AutoGraph, which converts what a `tf.function` calls, warns of a
        # function that consists of a docstring.
        return

    @staticmethod
    def join(answers):
        """Join answers, one behind the other.

        Args:
            answers: List of what `answer_in` returned, or of vectors.

        Returns:
            Vector.
        """
        return answers[0] if len(answers) == 1 else ops.concatenate(answers)

    @staticmethod
    def sum_over_replicas(probes, answers, wanted):
        """Sum up the answers of all replicas of a data-parallel step.

        Args:
            probes: List of `Probe`s.
            answers: List with the answer of each of them.
            wanted: Bool or boolean tensor. If false, the sums aren't read, and
                nothing needs to be sent.

        Returns:
            A list like `answers`, as if one device had seen the whole batch.
        """
        return answers

    @staticmethod
    def differentiate(compute_loss, data, probes, variables):
        """Differentiate a loss with respect to probes, eagerly.

        Args:
            compute_loss: Callable that takes `*data` and returns a scalar
                tensor.
            data: Tuple of nested tensors.
            probes: List of `Probe`s.
            variables: List of all variables that `compute_loss` reads.

        Returns:
            List with the gradient of each probe, a tensor or `None`. Nothing
            else keeps a gradient.
        """
        raise NotImplementedError("Keras has no operation for this.")

    def measure_activations(self, h):
        """The first part of an answer, `(1, mean h²)`, scaled.

        Args:
            h: The activations that enter the block.

        Returns:
            Float32 tensor of shape `(1 + entries of H,)`.
        """
        return self._join(self.activation_parts(h))

    def measure_gradients(self, s):
        """The second part of an answer, the mean squares of `s`, scaled.

        Args:
            s: The gradient of the loss at the block's pre-activation.

        Returns:
            Float32 tensor of the remaining entries.
        """
        return self._join(self.gradient_parts(s))

    def activation_parts(self, h):
        """List of the vectors that `measure_activations` joins, not scaled."""
        statistic = self.activation_vector(h)
        return [self.one_call(statistic), statistic]

    def activation_vector(self, h):
        """The mean squares of `h`, in a vector, not scaled."""
        # Split like the layer, whatever becomes of it: otherwise the compiler
        # may choose that its input is whole, and gather that at each step.
        statistic = backend.broadcast_layout(
            self.block.activation_statistic(h),
            self.block.activation_shape,
            self.block.parameters[:1],
        )
        return _flat(statistic)

    @staticmethod
    def one_call(x):
        """A 1 in a vector of its own, on the device of a tensor `x`.

        The sum of these says how often a layer was called.
        """
        return np.ones(1, "float32")

    def gradient_parts(self, s):
        """List of the vectors that `measure_gradients` joins, not scaled."""
        statistic = self.block.gradient_statistic(s)
        shares_gradient = self.block.bias_gradient_shape is None
        statistic = backend.broadcast_layout(
            statistic,
            statistic.shape,
            self.block.parameters[: 2 if shares_gradient else 1],
        )
        parts = self.block.split_gradient(statistic)
        return [_flat(part) for part in parts if part is not None]

    def _join(self, parts):
        # Whole on each device, one by one: pieces of split parts don't fit
        # together.
        parts = [
            backend.constrain_layout(part, self.variable) for part in parts
        ]
        vector = parts[0] if len(parts) == 1 else ops.concatenate(parts)
        scale = self.ANSWER_SCALE
        return vector if scale == 1 else vector * scale

    def split(self, answer):
        """Take an answer apart.

        Args:
            answer: Array of shape `(size,)`, not scaled.

        Returns:
            The number of calls, and the sums of `H` and of `S`, in their
            blocks' shapes.
        """
        calls, activation, gradient = np.split(
            answer, np.cumsum(self.sizes)[:2]
        )
        return (
            float(calls[0]),
            activation.reshape(self.block.activation_shape),
            gradient[: self.sizes[2]].reshape(self.block.gradient_shape),
        )


def _flat(statistic):
    # Somebody else's block may return another dtype than ours.
    return backend.reshape(ops.cast(statistic, "float32"), (-1,))
