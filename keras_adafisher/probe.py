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

On TensorFlow and JAX, answers travel in the list of gradients, where other code
may look at them: it clips by a global norm, or adds a penalty. So they are
scaled by a power of two, which floating point does exactly. They are then too
small to be noticed there, and the optimizer gets back what was measured, bit by
bit. On PyTorch a probe is a tensor that no list has.
"""

import math
import weakref

import keras
import numpy as np
from keras import ops

from keras_adafisher import backend
from keras_adafisher import steps

# See the top. On PyTorch it is 1.
ANSWER_SCALE = backend.ANSWER_SCALE


class Probe:
    """Where one block reports what it measures.

    Args:
        block: The `Block` that measures.
        host: The layer that the block is in.
        name: String, unique among the probes of the layer.

    Attributes:
        size: Int, the length of the vector: one for the number of calls, then
            the entries of `H`, of `S` and, if the bias has an `S` of its own,
            of that.
        variable: `keras.Variable` of shape `(size,)`, which has to be
            differentiated with the parameters. `None` on PyTorch.
        tensor: On PyTorch, the tensor in its place. `None` elsewhere.
        optimizers: Weak set of the AdaFishers that have been built for the
            block.
        process_group: On PyTorch, the processes whose answers belong together.
        answer: On PyTorch, what was measured since the last update.
        is_asked: On PyTorch, whether a compiled function measures.
    """

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
        self.optimizers = weakref.WeakSet()
        self.process_group = None
        self.answer = None
        self.is_asked = True
        self.variable = None
        self.tensor = backend.make_probe_tensor(self.size, block.parameters[0])
        if self.tensor is None:
            self.variable = self._make_variable(name)

    def _make_variable(self, name):
        parameter = self.block.parameters[0]
        with backend.creation_scope(parameter):
            variable = keras.Variable(
                # NumPy's. JAX compiles its own anew for each shape.
                np.zeros,
                shape=(self.size,),
                dtype="float32",
                # Under mixed precision a variable is cast where it is read,
                # and it and its gradient would differ in dtype.
                autocast=False,
                aggregation="only_first_replica",
                layout=backend.whole_layout(parameter),
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
        # Split like the layer, whatever becomes of it: otherwise the compiler
        # may choose that its input is whole, and gather that at each step.
        statistic = backend.keep_layout_of(
            self.block.activation_statistic(h),
            self.block.activation_shape,
            self.block.parameters[:1],
        )
        return [backend.one(statistic), backend.reshape(statistic, (-1,))]

    def gradient_parts(self, s):
        """List of the vectors that `measure_gradients` joins, not scaled."""
        statistic = self.block.gradient_statistic(s)
        shares_gradient = self.block.bias_gradient_shape is None
        statistic = backend.keep_layout_of(
            statistic,
            statistic.shape,
            self.block.parameters[: 2 if shares_gradient else 1],
        )
        parts = self.block.split_gradient(statistic)
        return [
            backend.reshape(part, (-1,)) for part in parts if part is not None
        ]

    def _join(self, parts):
        # Whole on each device, one by one: pieces of split parts don't fit
        # together.
        parts = [backend.keep_layout(part, self.variable) for part in parts]
        vector = parts[0] if len(parts) == 1 else ops.concatenate(parts)
        return vector if ANSWER_SCALE == 1 else vector * ANSWER_SCALE

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


def probe_of(variable):
    """The `Probe` that a variable belongs to, `None` for a parameter."""
    return getattr(variable, "adafisher_probe", None)


def probes_at(parameter):
    """List of the `Probe`s that measure for a parameter of a wrapped layer."""
    return getattr(parameter, "adafisher_probes", [])


def probes_of(parameters):
    """List of the `Probe`s that measure for some parameters.

    Without those of layers that don't train. Where several optimizers share a
    layer's parameters, the probe goes with the weight: it answers once.
    """
    parameters = list(parameters)
    known = {id(parameter) for parameter in parameters}
    found = {}
    for parameter in parameters:
        for probe in probes_at(parameter):
            weight = probe.block.parameters[0]
            is_elsewhere = weight.trainable and id(weight) not in known
            if probe.host.trainable and not is_elsewhere:
                found[id(probe)] = probe
    return list(found.values())


def with_probes(variables):
    """Some variables, and behind them the probes that measure for them.

    Args:
        variables: List of variables.

    Returns:
        List. On PyTorch, where probes are no variables, an equal one.
    """
    known = {id(variable) for variable in variables}
    # What is estimated has no tap, and its probe never has a gradient.
    probes = [
        probe.variable
        for probe in probes_of(variables)
        if not probe.block.is_estimated
    ]
    return [
        *variables,
        *(v for v in probes if v is not None and id(v) not in known),
    ]


def mark_parameters(probe):
    """Let `probes_at` find a probe."""
    for parameter in probe.block.parameters:
        parameter.adafisher_probes = [*probes_at(parameter), probe]


def unmark_parameters(probe):
    """Undo `mark_parameters`."""
    for parameter in probe.block.parameters:
        others = [p for p in probes_at(parameter) if p is not probe]
        if others:
            parameter.adafisher_probes = others
        else:
            del parameter.adafisher_probes


def tap(z, h, probe):
    """Let `probe` measure a block between its input and its output.

    Args:
        z: Tensor, the block's pre-activation.
        h: Tensor, the activations that the block made `z` from.
        probe: The block's `Probe`.

    Returns:
        `z`, unchanged.
    """
    request = steps.request_of(probe)
    if request is False:
        return z
    return backend.tap(z, h, probe, request)
