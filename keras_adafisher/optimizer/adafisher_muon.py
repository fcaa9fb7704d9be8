"""AdaFisherMuon: AdaFisher's factors whiten what Muon orthogonalizes."""

import functools
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import Self

import keras
from keras import ops

from keras_adafisher import backend
from keras_adafisher.aliases import LearningRate
from keras_adafisher.aliases import Normalization
from keras_adafisher.copies import with_attribute
from keras_adafisher.factors.normalization import mean_scaled
from keras_adafisher.optimizer import arguments
from keras_adafisher.optimizer.adafisher import AdaFisher
from keras_adafisher.optimizer.adafisher import register
from keras_adafisher.optimizer.orthogonal import costs_little
from keras_adafisher.optimizer.orthogonal import Kernel
from keras_adafisher.optimizer.orthogonal import OrthogonalSteps
from keras_adafisher.optimizer.orthogonal import positions_of
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.embedding import EmbeddingBlock

# What `direction_of` says of kernels with a kept root.
KEPT = "orthogonalized, root kept"

# Embeddings of up to so many entries take full steps, or of up to this share of
# how many there are, and larger ones steps of the same length.
# `docs/quality_diary.md` has the experiments.
LARGEST_FULL_SIZE = 32
FULL_SIZE_SHARE = 1 / 8


@keras.saving.register_keras_serializable(package="keras_adafisher")
class AdaFisherMuon(AdaFisher):
    r"""AdaFisher whose steps for kernels are orthogonalized, as Muon's are.

    The momentum `M` of a kernel, a matrix of inputs by outputs, is whitened by
    the Kronecker factors, replaced by a semi-orthogonal matrix, and brought
    back:

        O <- orthogonalize(H^(-1/2) M S^(-1/2))
        W <- W - learning_rate * (sqrt(max(1, outputs / inputs))
                                  * H^(-1/2) O S^(-1/2) + weight_decay * W)

    where `H` and `S` are the layer's factors, plus `factor_damping` and divided
    by their means. `orthogonalize` sets the singular values to about one, so
    that a step moves the layer's outputs along all directions alike, not along
    the few that dominate the gradient. This is what makes it fast; whitening
    makes a difference of a few per cent at most (`docs/quality_diary.md`).

    Which parameters take this step is decided by their layers: kernels of
    `Dense`, `EinsumDense` and attention, of convolutions (taps and channels by
    filters, each group by itself), transposed ones too, of recurrent layers,
    and of experts (each by itself). Embeddings, normalizations, depthwise
    kernels and biases take `AdaFisher`'s own step with the same learning rate,
    and what has no factors takes AdamW's. The size of embeddings' steps is
    measured over the ids of a batch, not over the rows of their table, most of
    which are used rarely. Where embeddings are wide and symbols few, as the
    bytes of a text are, entries move by `sqrt(32 / size)` of the learning rate,
    but by about a third of it at least. `keras_adafisher.coverage(model)` tells
    for each parameter which step it takes. Unlike with `keras.optimizers.Muon`,
    the kernel of the last layer needn't be excluded.

    Orthogonalizing takes about `4 m² n + 30 m³` operations for an `m` by `n`
    kernel, `m` the smaller side, each time. Next to the layer's own work,
    `6 m n` for each example, that is little in a transformer and much
    in a wide dense network with small batches. There `keep_roots` makes do with
    an inverse root of the Gram matrix that is made anew at one step in
    `factor_update_steps`, and costs one product of matrices at the others.

    The combination is ours.

    References:
        - [Jordan, 2024](https://kellerjordan.github.io/posts/muon/)
        - [Liu et al., 2025](https://arxiv.org/abs/2502.16982)
        - [Martins Gomes et al., ICLR 2025](https://arxiv.org/abs/2405.16397)

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule` instance, or
            a callable that takes no arguments and returns the actual value to
            use. The learning rate. It isn't Adam's: without whitening, and
            with fresh roots, it is about the spectral norm of a square kernel's
            step. The default is for a rate that stays as it is; under a
            schedule that ends at zero, begin with `0.04`. Defaults to `0.01`.
        weight_decay: Float. If set, weight decay is applied, decoupled from
            the gradient, to kernels whose steps are orthogonalized. Defaults to
            `0.2`.
        adam_weight_decay: Float. The same for all other parameters, as in
            `keras.optimizers.Muon`. Defaults to `0.1`.
        beta: A float in [0, 1). The exponential decay rate of the momentum.
            Defaults to `0.9`.
        factor_damping: A positive float, added to each factor before its
            inverse root is taken. The factors are 1 on average; a number that
            is much larger leaves the momentum as it is, which makes this Muon.
            Defaults to `1.0`.
        ns_steps: An integer from 1 to 6. The number of Newton–Schulz
            iterations. Defaults to `5`.
        keep_roots: Bool or "auto". Whether inverse roots are kept for some
            steps. `False` takes fresh ones at each step, which is best where
            it costs little. `True` takes one more matrix of the kernel's
            smaller side as state (cut into blocks of 128 where it is longer),
            still less than Adam's second moment. "auto" keeps those of
            kernels with a smaller side of more than 64 where orthogonalizing
            would take more than half of the layer's own work with a batch of
            64. It can't be changed once the optimizer is built. Defaults to
            `"auto"`.
        kernel_update_steps: A positive integer `k`. Kernels whose steps are
            orthogonalized take such a step at every `k`-th update, of `k` times
            the learning rate: orthogonalizing costs a `k`-th. Their momentum
            takes in each gradient, they decay at each update, and all other
            parameters move at each. Updates after the last `k`-th one are lost
            to kernels, and a kernel that has no gradient in a `k`-th update
            stays. What it costs in loss is in the guide: 1 % in a GPT with 2,
            up to 30 % in others with 4, less the longer a run is. Defaults to
            `1`.
        exclude_layers: List of strings, regular expressions that are searched
            for in the paths of variables, with and without the model's name.
            Kernels with one of them take `AdaFisher`'s own step. It can't be
            changed once the optimizer is built. Defaults to `None`.
        adam_lr_ratio: A positive float. The learning rate of all parameters
            whose steps aren't orthogonalized, as a share of the learning rate,
            as in `keras.optimizers.Muon`. It doesn't change by how much they
            decay. Defaults to `1.0`.

    All other arguments are those of `keras_adafisher.AdaFisher`, in its order.

    Raises:
        ValueError: As `keras_adafisher.AdaFisher`.
        TypeError: As `keras_adafisher.AdaFisher`.
    """

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        weight_decay: float | None = 0.2,
        adam_weight_decay: float | None = 0.1,
        beta: float = 0.9,
        factor_damping: float = 1.0,
        ns_steps: int = 5,
        keep_roots: bool | Literal["auto"] = "auto",
        kernel_update_steps: int = 1,
        exclude_layers: Sequence[str] | None = None,
        adam_lr_ratio: float = 1.0,
        damping: float = 1.0,
        gamma_1: float = 0.2,
        gamma_2: float = 0.2,
        factor_update_steps: int = 10,
        epsilon: float = 0.0,
        normalization: Normalization = "mean",
        nesterov: bool = True,
        rms_decay: float | None = 0.99,
        adam_beta_2: float = 0.999,
        adam_epsilon: float = 1e-7,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float | Literal["auto"] = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        for what, value in {
            "adam_weight_decay": adam_weight_decay,
            "factor_damping": factor_damping,
            "ns_steps": ns_steps,
            "keep_roots": keep_roots,
            "kernel_update_steps": kernel_update_steps,
            "exclude_layers": exclude_layers,
            "adam_lr_ratio": adam_lr_ratio,
        }.items():
            arguments.check(what, value)
        super().__init__(
            learning_rate=learning_rate,
            beta=beta,
            damping=damping,
            gamma_1=gamma_1,
            gamma_2=gamma_2,
            factor_update_steps=factor_update_steps,
            epsilon=epsilon,
            normalization=normalization,
            nesterov=nesterov,
            rms_decay=rms_decay,
            adam_beta_2=adam_beta_2,
            adam_epsilon=adam_epsilon,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        self.adam_weight_decay = adam_weight_decay
        self.factor_damping = factor_damping
        self.ns_steps = ns_steps
        self.keep_roots = keep_roots
        self.kernel_update_steps = kernel_update_steps
        self.exclude_layers = exclude_layers
        self.adam_lr_ratio = adam_lr_ratio

    @classmethod
    def as_published(cls, **overrides: Any) -> Self:
        raise NotImplementedError(
            "The published method has no orthogonalized steps. Use "
            "`keras_adafisher.AdaFisher.as_published()`."
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "adam_weight_decay": self.adam_weight_decay,
                "factor_damping": self.factor_damping,
                "ns_steps": self.ns_steps,
                "keep_roots": self.keep_roots,
                "kernel_update_steps": self.kernel_update_steps,
                "exclude_layers": self.exclude_layers,
                "adam_lr_ratio": self.adam_lr_ratio,
            }
        )
        return config

    def direction_of(
        self,
        weight: keras.Variable,
        blocks: Sequence[Block],
        layer: keras.layers.Layer,
    ) -> str:
        # A weight that is used in several ways has factors for each.
        view = blocks[0].matrix_view() if len(blocks) == 1 else None
        is_excluded = arguments.matches(self.exclude_layers, weight.path)
        is_empty = 0 in weight.shape
        is_own = weight is blocks[0].weight
        if view is None or not is_own or is_excluded or is_empty:
            return "diagonal"
        keeps_root = self.keep_roots
        if keeps_root == "auto":
            positions = positions_of(blocks[0], layer)
            keeps_root = not costs_little(view, positions)
        return KEPT if keeps_root else "orthogonalized"

    # Not public, but Keras' own Muon overrides it, and there is no other way to
    # let parameters decay by different amounts.
    def _apply_weight_decay(self, variables):
        kernels = self._orthogonal.kernels if self._orthogonal else {}
        decaying = {True: [], False: []}
        for variable in variables:
            # Not public either. On PyTorch, Keras fails if it leaves none.
            if self._use_weight_decay(variable):
                is_kernel = self._get_variable_index(variable) in kernels
                decaying[is_kernel].append(variable)
        for is_kernel, decay in (
            (True, self.weight_decay),
            (False, self.adam_weight_decay),
        ):
            if decay is None or not decaying[is_kernel]:
                continue
            # Keras reads the attribute, on TensorFlow after other replicas'
            # threads have run.
            copy = with_attribute(self, "weight_decay", decay)
            super(AdaFisherMuon, copy)._apply_weight_decay(decaying[is_kernel])

    def _own_learning_rate(self, learning_rate):
        if self.adam_lr_ratio == 1:
            return learning_rate
        return learning_rate * self.adam_lr_ratio

    def _weighted(self, index, gradient):
        factors = self._fishers[index].factors_of_weight
        # A table that is tied to the last layer has a second block. All of its
        # rows are in use there.
        if len(factors) != 1 or not isinstance(
            factors[0].block, EmbeddingBlock
        ):
            return gradient
        # Of what a step adds to the embeddings in a batch, not to the rows of
        # the table: most of them are used rarely, or never.
        weights = mean_scaled(factors[0].activation)
        # Min–Max normalization makes zeros of equal frequencies, and zeros stay
        # zeros. Of others, the largest is 1 at least.
        weights = backend.filled(weights, ops.max(weights) < 1, 1.0)
        gradient = ops.convert_to_tensor(gradient)
        scales = ops.sqrt(weights) / _rate_share(weights, *gradient.shape)
        return gradient * ops.cast(scales, gradient.dtype)

    def _make_orthogonal_steps(self, variables, add_variable):
        kernels = {}
        for index, variable in enumerate(variables):
            kernel = self._kernel(
                variable, self._fishers[index].factors_of_weight
            )
            if kernel is not None:
                kernels[index] = kernel
        if not kernels:
            return None
        layout = backend.replicated_layout(
            next(iter(kernels.values())).variable
        )
        return OrthogonalSteps(
            kernels, self, functools.partial(add_variable, layout=layout)
        )

    def _kernel(self, variable, found):
        """The `Kernel` of a parameter, `None` if its steps stay as they are."""
        # A weight that is used in several ways has factors for each.
        if len(found) != 1:
            return None
        (factors,) = found
        direction = self.direction_of(
            variable, [factors.block], factors.probe.host
        )
        if direction == "diagonal":
            return None
        return Kernel(
            variable,
            factors,
            factors.block.matrix_view(),
            keeps_root=direction == KEPT,
        )


def _rate_share(weights, rows, size):
    """How large steps of embeddings are, as a share of the learning rate.

    Args:
        weights: Tensor, how often each row of the table is used, 1 on average.
        rows: Int, how many embeddings there are.
        size: Int, how many entries each has.
    """
    full_size = max(LARGEST_FULL_SIZE, rows * FULL_SIZE_SHARE)
    if size <= full_size:
        return 1.0
    # How frequent ids are on average over those of a batch, next to the most
    # frequent one: 1 for positions, a third for the letters or words of a text.
    evenness = ops.mean(ops.square(weights)) / ops.max(weights)
    return ops.maximum(evenness, (full_size / size) ** 0.5)


register(AdaFisherMuon)
