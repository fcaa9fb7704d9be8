"""The base class of all layer wrappers."""

import functools
import numbers
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_adafisher import steps
from keras_adafisher.aliases import Tensor
from keras_adafisher.copies import with_attribute
from keras_adafisher.probe import BackendProbe
from keras_adafisher.probe import mark_parameters
from keras_adafisher.probe import Probe
from keras_adafisher.probe import unmark_parameters
from keras_adafisher.wrappers.block import Block

# Where a wrapped layer keeps its wrapper. Keras saves what it finds in a
# layer's attributes, except under names that begin with two underscores: so a
# wrapped model's files are those of the plain model.
_ATTRIBUTE = "__adafisher__"


class LayerWrapper(keras.layers.Layer):
    """Measures the Kronecker factors of one layer while it trains.

    A wrapper belongs to the layer that it wraps, its *host*, without being one
    of its sub-layers. It owns the probes, and where it may measure, its `call`
    runs in place of the host's. The host stays the same object with the same
    variables, config and saved files.

    A subclass says for one layer class what is factored and where it is
    measured. For a layer that computes `tanh(h W)`:

    ```python
    from keras_adafisher.wrappers import DenseBlock


    @keras_adafisher.register_wrapper(TanhDense)
    class TanhDenseWrapper(keras_adafisher.LayerWrapper):
        def make_blocks(self):
            inputs, outputs = self.host.kernel.shape
            return [DenseBlock(self.host.kernel, None, inputs, outputs)]

        def call(self, inputs):
            z = keras.ops.matmul(inputs, self.host.kernel)
            return keras.ops.tanh(self.tap(z, inputs))
    ```

    `keras_adafisher.wrappers` has a block for each kind of linear map.

    Args:
        host: The layer, built.

    Raises:
        TypeError: `host` is no layer, or `make_blocks` returns anything but
            blocks.
        ValueError: `host` isn't built, or a block's factors don't broadcast to
            their parameter.

    Attributes:
        host: The layer.
        blocks: List of the `Block`s with parameters.
        probes: List of `Probe`s, one for each of them.
    """

    host: keras.layers.Layer
    blocks: list[Block]
    probes: list[Probe]
    built: bool

    def __init__(self, host: keras.layers.Layer) -> None:
        if not isinstance(host, keras.layers.Layer):
            raise TypeError(
                "Argument `host` must be a `keras.layers.Layer`. "
                f"Received: host={host} (of type {type(host)})"
            )
        if not host.built:
            raise ValueError(
                "Argument `host` must be a layer that is built. Call its "
                "`build()` or call it on a batch of data first, or let "
                f"`keras_adafisher.wrap` wait for it. Received: host={host}"
            )
        super().__init__(name="adafisher")
        # Past Keras' tracking: the host owns the wrapper, not the reverse.
        self.__dict__["host"] = host
        self._all_blocks = self._checked_blocks()
        # For each of them its probe or, if it has no parameters, `None`.
        self._taps = []
        self.blocks = [b for b in self._all_blocks if b.parameters]
        for block in self.blocks:
            _check_shapes(block, host)
        self.probes = []

    def _checked_blocks(self):
        blocks = self.make_blocks()
        if not isinstance(blocks, list | tuple) or not all(
            isinstance(block, Block) for block in blocks
        ):
            raise TypeError(
                f"`{self.__class__.__name__}.make_blocks()` must return a list "
                "of blocks, such as `keras_adafisher.wrappers.DenseBlock`. "
                f"Received: {blocks}"
            )
        return list(blocks)

    def build(self) -> None:
        # Where one looks for what belongs to the host, beside its weights.
        path = self.host.path or self.host.name
        with keras.name_scope(
            self.name,
            caller=self,
            # Keras is in a scope of the same name and caller as it calls
            # `build`, and would take this one for that.
            deduplicate=False,
            override_parent=path,
        ):
            for index, block in enumerate(self._all_blocks):
                probe = None
                if block.parameters:
                    suffix = f"_{index}" if index else ""
                    probe = BackendProbe(block, self.host, f"probe{suffix}")
                    self.probes.append(probe)
                self._taps.append(probe)

    def measure(self, blocks: list[Block]) -> None:
        """Measure other blocks than those that the layer's update needs.

        For a wrapper that isn't attached.

        Args:
            blocks: List of `Block`s, one for each that `make_blocks` returned.
        """
        self._all_blocks = blocks
        self.blocks = [block for block in blocks if block.parameters]

    def make_blocks(self) -> Sequence[Block]:
        """The Kronecker-factored blocks of the host.

        Called once, when the host is built.

        Returns:
            A list of `Block`s. Those without parameters aren't measured.
        """
        raise NotImplementedError(
            f"{self.__class__.__name__} must override `make_blocks()`."
        )

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The host's computation with the taps in it.

        Takes what the host's own `call` takes and must return exactly what
        that returns: where nothing is to be measured, the host's own is called.
        Without an override there are no taps, and the factors are estimated
        from the weights' gradients: see `GradientBlock`.
        """
        return self.host_call(*args, **kwargs)

    def tap(self, z: Tensor, h: Tensor, block: int = 0) -> Tensor:
        """Measure a block here.

        Args:
            z: The block's pre-activation.
            h: The activations that the block made `z` from.
            block: Int, index into what `make_blocks` returned.

        Returns:
            `z`, unchanged.

        Raises:
            ValueError: There is no such block.
        """
        try:
            probe = self._taps[block]
        except (IndexError, TypeError):
            raise ValueError(
                "Argument `block` of `tap` must be an index into what "
                f"`{self.__class__.__name__}.make_blocks()` returned, which "
                f"has {len(self._taps)} blocks. Received: block={block}"
            ) from None
        return z if probe is None else probe.tap(z, h)

    def host_call(self, *args: Any, **kwargs: Any) -> Any:
        """What the host's class computes."""
        return type(self.host).call(self.host, *args, **kwargs)

    def host_call_without(
        self, attribute: str, *args: Any, **kwargs: Any
    ) -> Any:
        """What the host's class computes if an attribute is `None`.

        Args:
            attribute: String, the attribute's name.
            *args: Arguments of the host's `call`.
            **kwargs: Arguments of the host's `call`.
        """
        # Whatever `call` the class has.
        copy = with_attribute(self.host, attribute, None)
        return type(self.host).call(copy, *args, **kwargs)

    def host_call_without_activation(self, *args: Any, **kwargs: Any) -> Any:
        """What the host's class computes if its `activation` is `None`."""
        if self.host.activation in (None, keras.activations.linear):
            return self.host_call(*args, **kwargs)
        return self.host_call_without("activation", *args, **kwargs)

    def activate(self, z: Tensor) -> Tensor:
        """Apply the host's `activation`."""
        return z if self.host.activation is None else self.host.activation(z)

    def has_the_blocks_of(self, other: "LayerWrapper | None") -> bool:
        """Whether another wrapper, or `None`, factors the same parameters."""
        if other is None:
            return False
        return _parameter_ids(self) == _parameter_ids(other)

    def attach(self) -> None:
        """Take the place of the host's `call`."""
        host = self.host

        @functools.wraps(host.call)
        def call(*args, **kwargs):
            if any(map(steps.may_measure, self.probes)):
                return self.call(*args, **kwargs)
            # The plain layer. Python takes time on the way through a wrapper,
            # and where PyTorch has a GPU, the GPU waits for it.
            return self.host_call(*args, **kwargs)

        def rematerialized_call(fn, *args, **kwargs):
            # JAX finds earlier traces by the function's identity. A bound
            # method is a new object each time, `call` above is not.
            def fresh(*args, **kwargs):
                return fn(*args, **kwargs)

            cls = type(host)
            return cls.rematerialized_call(host, fresh, *args, **kwargs)

        if not self.built:
            self.build()
            self.built = True
        # Past Keras' tracking, which would make it a sub-layer.
        host.__dict__[_ATTRIBUTE] = self
        for probe in self.probes:
            mark_parameters(probe)
        host.call = call
        host.rematerialized_call = rematerialized_call
        self._installed = (
            ("call", call),
            ("rematerialized_call", rematerialized_call),
        )

    def detach(self) -> None:
        """Give the host its own `call` back and leave it.

        Unless somebody has put another one in the place of the wrapper's.
        """
        host = self.host
        for probe in self.probes:
            unmark_parameters(probe)
        for name, own in self._installed:
            if host.__dict__.get(name) is own:
                delattr(host, name)
        del host.__dict__[_ATTRIBUTE]


class OutputWrapper(LayerWrapper):
    """Wrapper of a layer with one block, whose output is the layer's.

    A subclass has to override `make_blocks` only.
    """

    def call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.tap(self.host_call(inputs, *args, **kwargs), inputs)


class ActivationWrapper(LayerWrapper):
    """Wrapper of a layer with one block and then its `activation`.

    A subclass has to override `make_blocks` only.
    """

    def call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        z = self.host_call_without_activation(inputs, *args, **kwargs)
        return self.activate(self.tap(z, inputs))


def wrapper_of(layer: keras.layers.Layer) -> LayerWrapper | None:
    """The `LayerWrapper` of a wrapped layer, `None` for any other layer."""
    return vars(layer).get(_ATTRIBUTE)


def _parameter_ids(wrapper):
    return [[id(v) for v in block.parameters] for block in wrapper.blocks]


def variable_or_none(kernel):
    """A layer's kernel if it is one variable, `None` if it is computed.

    With LoRA enabled, `layer.kernel` is the sum of the frozen kernel and the
    product of two others. Then only the bias has factors.
    """
    return kernel if isinstance(kernel, keras.Variable) else None


def _check_shapes(block, host):
    """Raise a `ValueError` if factors don't broadcast to their parameter."""
    for name in ("activation_shape", "gradient_shape", "bias_gradient_shape"):
        shape = getattr(block, name)
        is_shape = isinstance(shape, tuple | list) and all(
            isinstance(size, numbers.Integral) and size >= 0 for size in shape
        )
        if not is_shape and not (name.startswith("bias") and shape is None):
            raise ValueError(
                f"`{name}` of a {type(block).__name__} must be a tuple of "
                f"integers >= 0. Layer '{host.path or host.name}' got "
                f"{name}={shape}"
            )
    of_weight = block.activation_shape, block.gradient_shape
    of_bias = (), block.bias_gradient_shape or block.gradient_shape
    for parameter, name, shapes in (
        (block.weight, "fisher_of_weight", of_weight),
        (block.bias, "fisher_of_bias", of_bias),
    ):
        if parameter is None:
            continue
        shape = tuple(parameter.shape)
        try:
            got = _fisher_shape(block, name, shapes)
            fits = np.broadcast_shapes(got, shape) == shape
        except ValueError:
            got, fits = "none", False
        if not fits:
            shapes = " and ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(
                "Kronecker factors must broadcast to their parameter. Layer "
                f"'{host.path or host.name}', parameter '{parameter.name}' of "
                f"shape {shape}: {block.__class__.__name__} has factors of "
                f"shapes {shapes}, which give a Fisher diagonal of shape {got}."
            )


def _fisher_shape(block, name, shapes):
    """Shape of the Fisher diagonal that a method of a block returns."""
    names = name, name.replace("fisher", "operands")
    if all(getattr(type(block), n) is getattr(Block, n) for n in names):
        return np.broadcast_shapes(*shapes)
    # Symbolic: only shapes are computed, however large the parameter is.
    factors = [keras.KerasTensor(shape, dtype="float32") for shape in shapes]
    return tuple(getattr(block, name)(*factors).shape)
