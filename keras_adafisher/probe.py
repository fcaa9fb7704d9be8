"""Request and response through autodiff.

Nothing but a gradient can leave a function that JAX differentiates, so the
statistics leave as one, on all backends. Each factored block owns a probe:
three small trainable variables (on PyTorch, plain tensors). A layer's
pre-activation passes through an identity, the tap, that takes them as further
inputs. In the backward pass the tap returns the statistics as *their*
gradients:

    forward    z ────────────────► z, and mean h²
    backward   dL/dz ◄──────────── s = dL/dz
               gradient of probe.activation  ◄── mean h²
               gradient of probe.gradient    ◄── mean s²
               gradient of probe.request     ◄── 1

The value of `probe.request` says whether they are wanted. If it is 0, the
answers are zeros and nothing is computed. It has one bit for each optimizer,
since models that share a layer may each be trained by one of their own.

Where a layer is called several times, autodiff sums the answers, and the sum
of the ones tells how many there were. No answer at all (an unused layer) sums
up to 0.
"""

import collections
import weakref

import numpy as np
from keras import ops

from keras_adafisher import backend

# The number of an optimizer that isn't known yet, and the largest number:
# float32 holds integers of 24 bits.
_WHOEVER_COMES = 0
_LAST = 23


class Probe:
    """The inputs of the tap through which one block reports its statistics.

    Args:
        block: The `Block` that measures.
        wrapper: The `LayerWrapper` that owns the probe.
        index: Int, the block's number in its layer.

    Attributes:
        shapes: Dict of the shapes of `request`, `activation`, `gradient`.
        inputs: List of the three.
        variables: Those of them that are Keras variables, which have to be
            differentiated with the parameters: all or, on PyTorch, none.
        request: Scalar. The next forward and backward pass are to answer
            unless it is 0. It is the sum of `2**number` over the optimizers
            that want an answer. It starts at 1: whichever comes first wants
            one. Its gradient is the number of answers.
        activation: Of the shape of `H`. Its gradient is the sum of the
            answers. The value is zero, and an answer where none is wanted.
        gradient: The same for `S`.
        is_tapped: Bool. Whether any forward pass has gone through the tap.
            None does if the layer isn't called, since other code reads its
            weights.
        listening: Int. Used instead of `request` on backends that run
            eagerly, where reading a tensor would wait for the device.
        process_group: The processes whose answers belong together, where the
            backend leaves it to the optimizer to sum them up.
    """

    def __init__(self, block, wrapper, index=0):
        self.block = block
        self._owner = wrapper.full_name
        self._suffix = f"_{index}" if index else ""

        def add_variable(what, shape):
            layout = backend.layout_like(self.parameters_of(what), shape)
            variable = wrapper.add_weight(
                shape=shape,
                # NumPy's. JAX compiles its own anew for each shape.
                initializer=np.ones if what == "request" else np.zeros,
                dtype="float32",
                # Under mixed precision a variable is cast where it is read,
                # and the tap's zeros and answers would differ in dtype.
                autocast=False,
                # Keras' own mark for a variable whose "gradient" is no
                # descent direction: no optimizer takes a step along it.
                overwrite_with_gradient=True,
                aggregation="only_first_replica",
                name=f"{what}{self._suffix}",
                **({} if layout is None else {"layout": layout}),
            )
            # How an optimizer that is given the variable finds its way back.
            variable.adafisher_probe = self
            return variable

        self.shapes = {
            "request": (),
            "activation": block.activation_shape,
            "gradient": block.gradient_statistic_shape,
        }
        self.inputs, self.variables = backend.make_inputs(
            block.parameters[0], add_variable, self.shapes
        )
        self.is_tapped = False
        self.listening = 1
        self.process_group = None
        self._numbers = weakref.WeakKeyDictionary()

    @property
    def request(self):
        return self.inputs[0]

    @property
    def activation(self):
        return self.inputs[1]

    @property
    def gradient(self):
        return self.inputs[2]

    def name(self, what):
        """A name for what belongs to the probe, of all that are alike."""
        return f"{self._owner}_{what}{self._suffix}"

    def parameters_of(self, what):
        """The block's parameters that what is measured is a factor of."""
        has_both = what == "gradient" and self.block.bias_gradient_shape is None
        return self.block.parameters[: 2 if has_both else 1]

    def answer(self, gradients):
        """What the backward pass reported, summed over the calls.

        Args:
            gradients: Dict from the id of each variable of `variables` that
                has a gradient to that.

        Returns:
            List of the gradients of `inputs`. Zeros for those without one.
        """
        found = backend.gradients_of(self, gradients)
        return [
            # What JAX gives for a layer that wasn't used.
            ops.zeros(shape, "float32") if gradient is None else gradient
            for shape, gradient in zip(self.shapes.values(), found, strict=True)
        ]

    def number_of(self, optimizer):
        """The number of an optimizer among those that train the block."""
        if optimizer is None:
            return _WHOEVER_COMES
        if optimizer not in self._numbers:
            taken = set(self._numbers.values())
            free = (n for n in range(1, _LAST) if n not in taken)
            self._numbers[optimizer] = next(free, _LAST)
        return self._numbers[optimizer]


def ask(probes, wanted, assign, optimizer=None):
    """Say whether the next forward and backward pass are to answer.

    Args:
        probes: List of `Probe`s.
        wanted: Bool or boolean tensor.
        assign: Callable `(variable, value)`.
        optimizer: The optimizer that asks. Others that train the same
            blocks keep their requests. `None`: on behalf of the one that
            comes next.
    """
    groups = collections.defaultdict(list)
    for probe in probes:
        groups[probe.number_of(optimizer)].append(probe)
    for number, group in groups.items():
        # An optimizer that asks has come.
        mask = ~(1 << number | 1 << _WHOEVER_COMES)
        backend.write_requests(group, mask, wanted, 1 << number, assign)


def probe_of(variable):
    """The `Probe` that a variable is part of, `None` for a parameter."""
    return getattr(variable, "adafisher_probe", None)


def probes_at(parameter):
    """List of the `Probe`s that measure for a parameter of a wrapped layer."""
    return getattr(parameter, "adafisher_probes", [])


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
    probe.is_tapped = True
    if not backend.open_tap(probe):
        return z
    return backend.tap(z, h, probe, _tap)


def _tap(z, h, probe):
    """The tap of a backend without one of its own."""
    block = probe.block
    request, activation, gradient = map(ops.convert_to_tensor, probe.inputs)
    # No backend hands a sparse tensor through a custom gradient. There is no
    # gradient from here: `h` has its own way back through the layer.
    h = ops.stop_gradient(ops.convert_to_tensor(h, sparse=False))

    def measured(h):
        return backend.keep_layout(
            block.activation_statistic(h), probe.activation
        )

    is_early = backend.measures_activations_early()
    if is_early:
        (h,) = _if_requested(request, lambda h=h: [measured(h)], [activation])

    @ops.custom_gradient
    def identity(z, h, request, activation, gradient):
        def grad(*args, upstream=None):
            if upstream is None:
                # TensorFlow and JAX pass it by position, PyTorch by name.
                (upstream,) = args
            backend.drop_stale_answer(probe)

            def answer():
                s = backend.keep_layout(
                    block.gradient_statistic(upstream), probe.gradient
                )
                return [s] if is_early else [measured(h), s]

            if is_early:
                answers = [h, *_if_requested(request, answer, [gradient])]
            else:
                answers = _if_requested(request, answer, [activation, gradient])
            calls = ops.cast(backend.is_requested(request), "float32")
            answers = map(backend.keep_layout, [calls, *answers], probe.inputs)
            return upstream, None, *answers

        return z, grad

    return identity(z, h, request, activation, gradient)


def _if_requested(request, answer, inputs):
    """A list that a function returns, or zeros of the shapes of `inputs`."""
    return backend.cond(
        backend.is_requested(request), answer, lambda: backend.silence(inputs)
    )
