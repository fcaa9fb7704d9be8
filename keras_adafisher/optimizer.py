"""AdaFisher: momentum divided by a Kronecker-factored Fisher diagonal.

The update of a weight, in one line:

    theta -= learning_rate * m / (H * S + damping)

`H` and `S` belong to the weight's layer. They come from the probes of its
wrapper, as gradients, in `apply`, and live here as optimizer variables.
"""

import functools
import sys
import warnings
import weakref

import keras
from keras import ops

from keras_adafisher import arguments
from keras_adafisher import backend
from keras_adafisher import steps
from keras_adafisher.curvature import Factors
from keras_adafisher.curvature import FisherDiagonal
from keras_adafisher.mean_squares import MeanSquares
from keras_adafisher.probe import probe_of
from keras_adafisher.probe import probes_at
from keras_adafisher.probe import probes_of
from keras_adafisher.probe import with_probes


@keras.saving.register_keras_serializable(package="keras_adafisher")
class AdaFisher(
    backend.Updater, arguments.Hyperparameters, keras.optimizers.Optimizer
):
    r"""Optimizer that implements the AdaFisher algorithm.

    AdaFisher is a second-order method. Where Adam divides the momentum by the
    square root of a running average of squared gradients, AdaFisher divides
    it by a diagonal approximation of the Fisher information:

        theta <- theta - learning_rate * m / (H * S + damping)

    `H` and `S` are running averages of two small vectors per layer, the mean
    square of the layer's inputs and the mean square of the gradients at its
    pre-activations, each normalized. There is no square root of a matrix or of
    a parameter's entries, and one momentum slot per parameter where Adam has
    two.

    The vectors are measured by wrappers around the layers.
    `model.compile(optimizer=AdaFisher())` wraps the model; in a custom
    training loop, call `keras_adafisher.wrap(model)` first.

    Parameters that no wrapper factors (`keras_adafisher.coverage(model)`
    lists them) are updated by AdamW's rule with the same `learning_rate`,
    `weight_decay` and first moment, Nesterov's or not.

    As published, the size of a step follows that of the gradient. By default,
    each parameter's step is divided by one more number, the root mean square
    over all entries of what its gradients, divided by `H * S + damping`, were
    lately (`rms_decay`), and no entry moves by more than the learning rate. So
    a step is about as large as Adam's, learning rates that suit Adam suit
    AdaFisher, and the scale of the loss doesn't matter.

    The update as published, with the settings of the authors' code:

        AdaFisher(
            learning_rate=0.001,
            damping=0.001,
            gamma_1=0.92,
            gamma_2=0.008,
            factor_update_steps=100,
            epsilon=1e-6,
            normalization="min_max",
            nesterov=False,
            rms_decay=None,
        )

    References:
        - [Martins Gomes et al., ICLR 2025](https://arxiv.org/abs/2405.16397)

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule` instance, or
            a callable that takes no arguments and returns the actual value to
            use. The learning rate. Defaults to `0.003`.
        beta: A float in [0, 1). The exponential decay rate of the momentum.
            Defaults to `0.9`.
        damping: A positive float, added to the Fisher diagonal. With
            `normalization="mean"` the diagonal is 1 on average. Defaults to
            `1.0`.
        gamma_1: A float in [0, 1). The share of the running factors that a
            new measurement replaces. Defaults to `0.2`.
        gamma_2: A float in [0, 1). The weight of a new measurement in the
            running factors. Defaults to `0.2`.
        factor_update_steps: A positive integer. The factors are measured
            every so many steps, the first step included. So are the mean
            squares of `rms_decay`, and at each of the first so many steps.
            Defaults to `10`.
        epsilon: A non-negative float, added to what a measurement is divided
            by to normalize it. Defaults to `0.0`, for which the normalization
            doesn't depend on the scale of the loss. The authors' code uses
            `1e-6`.
        normalization: "mean" or "min_max". What a measurement of `H` or `S`
            is divided by, so that layers compare: the mean of its entries, or
            their range after the smallest is taken off, as published, which
            puts them between 0 and 1. Defaults to `"mean"`.
        nesterov: Bool. Whether to apply Nesterov momentum. Defaults to `True`.
        rms_decay: A float in [0, 1) or `None`. The decay rate, per step, of
            the mean square over all entries of a parameter's gradient divided
            by `H * S + damping`. The parameter's steps are divided by its
            root, and their entries are bounded by the learning rate. `None`
            leaves both out, as published. One more number per parameter.
            Ours; the scale of a block is Adam-mini's (arXiv 2406.16793), the
            bound is Sophia's (arXiv 2305.14342). Defaults to `0.99`.
        adam_beta_2: A float in [0, 1). The decay rate of the second moment of
            parameters without factors. Defaults to `0.999`.
        adam_epsilon: A non-negative float, added to the square roots of that
            second moment and of the mean square of `rms_decay`. Defaults to
            `1e-7`.
        name: String. The name to use for momentum accumulator weights created
            by the optimizer. Defaults to "adafisher", and then
            "adafisher_1" and so on.
        weight_decay: Float. If set, weight decay is applied, decoupled from
            the gradient. (To add `weight_decay * theta` to the gradient, give
            layers a `kernel_regularizer=keras.regularizers.L2(weight_decay /
            2)`.)
        clipnorm: Float. If set, the gradient of each weight is individually
            clipped so that its norm is no higher than this value.
        clipvalue: Float. If set, the gradient of each weight is clipped to be
            no higher than this value.
        global_clipnorm: Float. If set, the gradient of all weights is clipped
            so that their global norm is no higher than this value.
        use_ema: Boolean, defaults to `False`. If `True`, exponential moving
            average (EMA) is applied, as in all Keras optimizers.
        ema_momentum: Float, defaults to 0.99. Only used if `use_ema=True`.
        ema_overwrite_frequency: Int or None, defaults to None. Only used if
            `use_ema=True`.
        loss_scale_factor: Float or `None`. If a float, the scale factor will
            be multiplied the loss before computing gradients, and the inverse
            of the scale factor will be multiplied by the gradients before
            updating variables.
        gradient_accumulation_steps: Int or `None`. If an int, model &
            optimizer variables will not be updated at every step; instead
            they will be updated every `gradient_accumulation_steps` steps,
            using the average value of the gradients since the last update.
            The factors are then measured on all steps that make up an update.

    Raises:
        ValueError: An argument is out of its range, when it is given or when
            the attribute of its name is assigned to, or there is no such
            argument.
        TypeError: `learning_rate` is a model or its parameters.
    """

    def __init__(
        self,
        learning_rate=0.003,
        beta=0.9,
        damping=1.0,
        gamma_1=0.2,
        gamma_2=0.2,
        factor_update_steps=10,
        epsilon=0.0,
        normalization="mean",
        nesterov=True,
        rms_decay=0.99,
        adam_beta_2=0.999,
        adam_epsilon=1e-7,
        weight_decay=None,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        name=None,
        **kwargs,
    ):
        arguments.check_names(kwargs)
        arguments.check_learning_rate(learning_rate)
        # All of them before Keras makes variables. What is assigned to them
        # later is checked by the same rules.
        for what, value in {
            "beta": beta,
            "damping": damping,
            "gamma_1": gamma_1,
            "gamma_2": gamma_2,
            "factor_update_steps": factor_update_steps,
            "epsilon": epsilon,
            "normalization": normalization,
            "nesterov": nesterov,
            "rms_decay": rms_decay,
            "adam_beta_2": adam_beta_2,
            "adam_epsilon": adam_epsilon,
            "weight_decay": weight_decay,
            "clipnorm": clipnorm,
            "clipvalue": clipvalue,
            "global_clipnorm": global_clipnorm,
            "ema_momentum": ema_momentum,
            "loss_scale_factor": loss_scale_factor,
            "gradient_accumulation_steps": gradient_accumulation_steps,
        }.items():
            arguments.check(what, value)
        if name is None:
            # As Keras names all optimizers. On its own it would begin with
            # "ada_fisher".
            name = self.__class__.__name__.lower()
            number = keras.backend.get_uid(name)
            name = name if number == 1 else f"{name}_{number - 1}"
        super().__init__(
            learning_rate=learning_rate,
            name=name,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            **kwargs,
        )
        # Whether it has warned that nothing is measured, and a reference to
        # the scale of the loss.
        self._has_warned = False
        self._has_warned_of_dropped = False
        self._loss_scale = lambda: None
        self.beta = beta
        self.damping = damping
        self.gamma_1 = gamma_1
        self.gamma_2 = gamma_2
        self.factor_update_steps = factor_update_steps
        self.epsilon = epsilon
        self.normalization = normalization
        self.nesterov = nesterov
        self.rms_decay = rms_decay
        self.adam_beta_2 = adam_beta_2
        self.adam_epsilon = adam_epsilon

    def build(self, variables):
        """Initialize optimizer variables.

        AdaFisher optimizer has 5 types of variables: momentums, velocities
        (for each parameter without factors), the running factors and how often
        they were measured (of all factored layers), and mean squares (of all
        parameters with factors).

        Args:
            variables: list of model variables to build AdaFisher variables
                on, `model.trainable_variables` of a wrapped model.

        Raises:
            TypeError: `variables` is anything else.
        """
        if self.built:
            return
        variables = _list_of_variables(variables)
        probes = probes_of(variables)
        if variables and not probes:
            warnings.warn(
                "AdaFisher found Kronecker factors for none of the "
                f"{len(variables)} variables that it is built with, and will "
                "update them by AdamW's rule. In a custom training loop, call "
                "`keras_adafisher.wrap(model)` first and pass "
                "`model.trainable_variables`. "
                "`keras_adafisher.coverage(model)` shows which layers of a "
                "model can be factored.",
                stacklevel=2,
            )
        # In a training step, lists have the probes too, behind the others.
        variables = [v for v in variables if probe_of(v) is None]
        weight_count = len(variables)
        variables = with_probes(variables)
        backend.check_same_strategy(variables, self._iterations)
        super().build(variables)

        self._weight_count = weight_count
        self._momentums = self.add_optimizer_variables(variables, "momentum")
        self._factors = Factors(
            probes,
            self.normalization,
            bool(self.gradient_accumulation_steps),
            self.add_variable,
        )
        self._curvatures = self._factors.curvatures
        for probe in probes:
            probe.optimizers.add(self)
        # Without one, AdamW's rule.
        self._fishers = [
            FisherDiagonal(self._factors.vector) for _ in variables
        ]
        # For each weight the factors that its gradient may have to estimate.
        self._curvatures_of = [[] for _ in variables]
        self._is_measuring_now = False
        self._update_now = None
        self._shared = None
        self._measured = set()
        self._unmeasured = set()
        for curvature in self._curvatures:
            for parameter, *term in curvature.terms():
                index = self._index_of(parameter)
                if index is None:
                    continue
                self._fishers[index].add(*term)
                if parameter is curvature.block.weight:
                    self._curvatures_of[index].append(curvature)
        self._velocities = [None] * len(variables)
        factored = []
        for index, variable in enumerate(variables):
            if self._momentums[index] is None:
                continue
            if self._fishers[index]:
                factored.append(index)
            else:
                self._velocities[index] = self.add_variable_from_reference(
                    variable, name="velocity"
                )
        self._mean_squares = None
        if factored and self.rms_decay is not None:
            self._mean_squares = MeanSquares(
                factored,
                self,
                functools.partial(
                    self.add_variable,
                    dtype="float32",
                    # All replicas write the same value.
                    aggregation="only_first_replica",
                    layout=backend.whole_layout(variables[factored[0]]),
                ),
            )

        if self.use_ema:
            # Keras has `None` in the place of a probe's average, and wants as
            # many as there are variables of the model.
            del self._model_variables_moving_average[weight_count:]

    def apply(self, grads, trainable_variables=None):
        """Update trainable variables according to provided gradient values.

        Args:
            grads: list of gradient tensors, those of the probes included.
            trainable_variables: list of the variables that the gradients
                belong to. Defaults to the list that the optimizer was built
                with.

        Raises:
            ValueError: There aren't as many gradients as variables.
        """
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                self.build(trainable_variables)
        elif self.built and len(grads) in (
            self._weight_count,
            len(self._trainable_variables),
        ):
            trainable_variables = self._trainable_variables[: len(grads)]
        if trainable_variables is None or len(grads) == 0:
            # Nothing to do, or Keras' own error.
            super().apply(grads, trainable_variables)
            return
        if len(grads) != len(trainable_variables):
            # What sums up gradients by hand was made outside of a step, with
            # one sum for each weight.
            weights = [v for v in trainable_variables if probe_of(v) is None]
            if len(grads) == len(weights):
                trainable_variables = weights
        if len(grads) != len(trainable_variables):
            raise ValueError(
                "Argument `grads` of `apply` must have one gradient for each "
                f"of the {len(trainable_variables)} variables. "
                f"Received: {len(grads)} gradients"
            )

        under_way = steps.current()
        if under_way is not None:
            under_way.count_apply(self)

        # Keras' part of the work (clipping, weight decay, accumulation,
        # averages, all-reduce) never sees a probe.
        answers = {}
        parameters = []
        parameter_grads = []
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            if probe_of(variable) is None:
                parameters.append(variable)
                parameter_grads.append(gradient)
            elif gradient is not None:
                answers[id(variable)] = gradient

        # Read before `super().apply` increments it, and for the update too.
        step = backend.step_number(self._iterations)
        is_plain = steps.mode() == "plain"
        self._is_measuring_now = not is_plain and self._is_measuring(step)
        self._update_now = self._updates_before(step)
        self._shared = {}
        try:
            self._update_factors(answers, step)
            for curvature in self._curvatures:
                backend.clear_answer(curvature.probe)
            super().apply(parameter_grads, parameters)
        finally:
            # No tensor of a trace that failed stays here.
            self._is_measuring_now = False
            self._update_now = None
            self._shared = None

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        """Stateless version of `apply` that returns modified variables.

        Args:
            optimizer_variables: list of tensors, the values of `variables`.
            grads: list of gradients, one for each of `trainable_variables`.
            trainable_variables: list of tensors, the values of the variables
                that the optimizer was built with, and in a training step those
                of the probes.

        Returns:
            A tuple of two lists of tensors, the updated `trainable_variables`
            and the updated `optimizer_variables`.
        """
        count = self.built and len(self._trainable_variables)
        if count and len(trainable_variables) == self._weight_count < count:
            # Outside of a training step there are no probes.
            missing = count - self._weight_count
            probes = self._trainable_variables[self._weight_count :]
            trainable_variables, optimizer_variables = super().stateless_apply(
                optimizer_variables,
                [*grads, *[None] * missing],
                [*trainable_variables, *probes],
            )
            return trainable_variables[:-missing], optimizer_variables
        return super().stateless_apply(
            optimizer_variables, grads, trainable_variables
        )

    def _prepare_updates(self, grads, variables):
        """Take in what gradients say, before any parameter is updated.

        Keras has accumulated and clipped them, and summed them over replicas.

        Args:
            grads: List of tensors.
            variables: List of the variables that they belong to.
        """
        gradients = {}
        unmeasured = {}
        for gradient, variable in zip(grads, variables, strict=True):
            index = self._get_variable_index(variable)
            if self._fishers[index]:
                gradients[index] = gradient
            for curvature in self._curvatures_of[index]:
                if id(curvature) in self._unmeasured:
                    unmeasured[id(curvature)] = gradient
                    curvature.is_estimated = True
        factors = self._factors

        def estimated():
            estimates = factors.join_estimates(unmeasured)
            return factors.taken_in(
                estimates, 1.0, 0.0, self.gamma_1, self.gamma_2
            )

        if unmeasured:
            self._assign_if(
                self._is_measuring_now, factors.variables[:2], estimated
            )

        def averaged():
            found = backend.mean_squares_of_quotients(
                list(gradients.values()),
                [self._fishers[index] for index in gradients],
                self.damping,
            )
            squares = dict(zip(gradients, found, strict=True))
            return [self._mean_squares.averaged(squares, self._update_now)]

        if gradients and self._mean_squares is not None:
            self._assign_if(
                self._mean_squares.are_measured(self._update_now),
                [self._mean_squares.variable],
                averaged,
            )

    def update_step(self, gradient, variable, learning_rate):
        """Update step given gradient and the associated model variable."""
        index = self._get_variable_index(variable)
        dtype = keras.backend.result_type(variable.dtype, "float32")
        lr = ops.cast(learning_rate, dtype)
        gradient = ops.cast(gradient, variable.dtype)

        m = self._momentums[index]
        change = (gradient - ops.convert_to_tensor(m)) * (1 - self.beta)
        self.assign_add(m, change)
        m = ops.convert_to_tensor(m)
        if self.nesterov:
            # The momentum as the next step would have it. (Not by way of
            # `change`, for which a compiler would keep the old momentum.)
            m = m + (gradient - m) * (1 - self.beta)

        is_factored = bool(self._fishers[index])
        if is_factored:
            denominator = self._fisher(index)
        else:
            # AdamW's rule, with Keras' placement of epsilon.
            v = self._velocities[index]
            change = ops.square(gradient) - ops.convert_to_tensor(v)
            self.assign_add(v, change * (1 - self.adam_beta_2))
            denominator = ops.sqrt(v) + self.adam_epsilon
        # Half precision has no room for the learning rate's quotient.
        rate = self._rate(index, lr, dtype)
        step = ops.divide(ops.multiply(m, rate), denominator)
        if is_factored and self._mean_squares is not None:
            step = ops.minimum(ops.maximum(step, -lr), lr)
        self.assign_sub(variable, ops.cast(step, variable.dtype))

    def _rate(self, index, learning_rate, dtype):
        """What a parameter's quotients are multiplied by, a scalar.

        The learning rate, corrected for averages that start at zero and, with
        `rms_decay`, divided by the root mean square of the quotients.
        """
        # The same for many variables: made once in each `apply`. But not the
        # learning rate, which a subclass may change from one to the next.
        made = {} if self._shared is None else self._shared
        is_factored = bool(self._fishers[index])
        key = is_factored, dtype
        if key not in made:
            step = _past_the_largest(ops.cast(self.iterations + 1, dtype))
            weight = 1 - ops.power(ops.cast(self.beta, dtype), step)
            if self.nesterov:
                weight = 1 - self.beta * (1 - weight)
            rate = 1 / weight
            if not is_factored:
                decay = ops.cast(self.adam_beta_2, dtype)
                rate = rate * ops.sqrt(1 - ops.power(decay, step))
            elif self._mean_squares is not None:
                roots = self._mean_squares.roots(
                    self.iterations, self.adam_epsilon
                )
                rate = rate / ops.cast(roots, dtype)
            made[key] = rate
        rate = made[key]
        if is_factored and self._mean_squares is not None:
            rate = self._mean_squares.of(rate, index)
        return learning_rate * rate

    def fisher_diagonal(self, variable):
        """The damped Fisher diagonal that a parameter's momentum is divided by.

        Args:
            variable: A variable that the optimizer was built with.

        Returns:
            Float32 tensor of the variable's shape, `H * S + damping`.

        Raises:
            ValueError: The optimizer doesn't know the variable, or updates it
                by AdamW's rule.
        """
        if not self.built:
            raise ValueError(
                f"Optimizer '{self.name}' has no Kronecker factors yet. Train "
                "a step first, or build it: "
                "`optimizer.build(model.trainable_variables)`."
            )
        index = self._index_of(variable)
        if index is None or not self._fishers[index]:
            name = getattr(variable, "path", variable)
            raise ValueError(
                "Argument `variable` must be a variable that the optimizer "
                "has Kronecker factors for. "
                "`keras_adafisher.coverage(model)` lists them. "
                f"Received: variable={name}"
            )
        return ops.broadcast_to(self._fisher(index), variable.shape)

    def effective_learning_rate(self, variable):
        """What each entry of a parameter's momentum is multiplied by.

        The momentum is meant without the bias of its start at zero. What comes
        out for an entry is how far it moves, with `rms_decay` by at most the
        learning rate.

        Args:
            variable: A variable that the optimizer was built with.

        Returns:
            Float32 tensor of the variable's shape: the learning rate divided
            by `fisher_diagonal(variable)` and, with `rms_decay`, by the root
            mean square of the preconditioned gradients. Before the first
            update there is none, and the learning rate is divided by
            `fisher_diagonal(variable)` only.

        Raises:
            ValueError: As `fisher_diagonal`.
        """
        denominator = self.fisher_diagonal(variable)
        if self._mean_squares is not None:
            last = ops.maximum(self.iterations - 1, 0)
            roots = self._mean_squares.roots(last, self.adam_epsilon)
            root = self._mean_squares.of(roots, self._index_of(variable))
            denominator = denominator * ops.where(self.iterations > 0, root, 1)
        return ops.cast(self.learning_rate, "float32") / denominator

    def measures_factors(self):
        """Whether the factors are measured at the step that comes next.

        Returns:
            Bool or boolean tensor.
        """
        return self._is_measuring(backend.step_number(self._iterations))

    def measures_anything(self):
        """Whether anything is measured at the step that comes next.

        The factors or, with `rms_decay`, the size of the steps.

        Returns:
            Bool or boolean tensor.
        """
        step = backend.step_number(self._iterations)
        if self._mean_squares is None:
            return self._is_measuring(step)
        return self._mean_squares.are_measured(self._updates_before(step))

    def leave(self, probes):
        """Ask some probes for nothing more: another optimizer has come.

        Args:
            probes: List of `Probe`s.
        """
        for probe in probes:
            probe.optimizers.discard(self)

    def check_that_layers_are_wrapped(self):
        """Raise a `ValueError` if `unwrap` has taken the wrappers off.

        Then nothing would be measured any more, and the factors would stay.
        """
        if not self.built:
            return
        lost = [
            curvature.block.parameters[0].path
            for curvature in self._curvatures
            if curvature.probe not in probes_at(curvature.block.parameters[0])
        ]
        if lost:
            raise ValueError(
                f"Optimizer '{self.name}' measures for {', '.join(lost)}, but "
                "the layers aren't wrapped any more. Call `model.compile` with "
                "a new optimizer before you train on."
            )

    def set_loss_scale(self, variable):
        """Say by what the loss is multiplied, beside `loss_scale_factor`.

        A `LossScaleOptimizer` does so when it is built.

        Args:
            variable: `keras.Variable`.
        """
        # A reference, which Keras doesn't take for a variable of this one's.
        self._loss_scale = weakref.ref(variable)

    def records_of(self, probe):
        """What has become of a block's measurements.

        Args:
            probe: The block's `Probe`.

        Returns:
            Tuple of two floats, how many the factors have taken in and how many
            they have dropped, and of a bool, whether the last one was an
            estimate from the weight's gradient. `None` if the optimizer has no
            factors of the block.
        """
        for number, curvature in enumerate(self._curvatures):
            if curvature.probe is probe:
                records = ops.convert_to_numpy(self._factors.records)
                taken, dropped = records.reshape(2, -1)[:, number]
                return float(taken), float(dropped), curvature.is_estimated
        return None

    def finalize_variable_values(self, var_list):
        """Set the final value of model's trainable variables.

        `fit` calls it at its end. It warns if there are layers of which no
        measurement could be used.

        Args:
            var_list: list of model variables.
        """
        super().finalize_variable_values(var_list)
        # After an error, variables may have no values on JAX.
        has_failed = sys.exc_info()[0] is not None
        if has_failed or not self.built or not self._curvatures:
            return
        records = ops.convert_to_numpy(self._factors.records).reshape(2, -1)
        unusable = [
            curvature.block.parameters[0].path
            for curvature, (taken, dropped) in zip(
                self._curvatures, records.T, strict=True
            )
            if dropped > taken
        ]
        if unusable and not self._has_warned_of_dropped:
            self._has_warned_of_dropped = True
            warnings.warn(
                "AdaFisher has dropped most of what it measured for "
                f"{', '.join(unusable)}, since it isn't finite or is negative, "
                "which a mean square can't be. Either the loss isn't finite, "
                "or something changes gradients before the optimizer gets "
                "them: noise, for instance. Leave out the last of them then, "
                "those of variables with `overwrite_with_gradient`.",
                stacklevel=2,
            )

    def load_own_variables(self, store):
        """Set the state of this optimizer object: all of it or nothing.

        Args:
            store: Dict from the number of each variable, a string, to its
                value. If it has another number of entries than the optimizer
                has variables, Keras warns and loads nothing.

        Raises:
            ValueError: A value is missing or has another shape.
        """
        names = list(store.keys())
        if len(names) == len(self.variables):
            # Keras finds out one by one, when the first ones are loaded. (Its
            # stores have a `get` that means something else.)
            needed = map(str, range(len(names)))
            self._check_state(
                [store[n] if n in names else None for n in needed]
            )
        super().load_own_variables(store)

    def set_weights(self, weights):
        """Set the weights of the optimizer: all of them or none.

        Args:
            weights: List of arrays, one for each of `variables`.

        Raises:
            ValueError: The optimizer isn't built, or the number of arrays or
                a shape is wrong.
        """
        weights = list(weights)
        if self.built:
            if len(weights) != len(self.variables):
                raise ValueError(
                    "Argument `weights` of `set_weights` must have one array "
                    f"for each of the optimizer's {len(self.variables)} "
                    f"variables. Received: {len(weights)} arrays"
                )
            self._check_state(weights)
        super().set_weights(weights)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "beta": self.beta,
                "damping": self.damping,
                "gamma_1": self.gamma_1,
                "gamma_2": self.gamma_2,
                "factor_update_steps": self.factor_update_steps,
                "epsilon": self.epsilon,
                "normalization": self.normalization,
                "nesterov": self.nesterov,
                "rms_decay": self.rms_decay,
                "adam_beta_2": self.adam_beta_2,
                "adam_epsilon": self.adam_epsilon,
            }
        )
        return config

    def _check_state(self, values):
        """Raise a `ValueError` if not all values fit their variables."""
        for variable, value in zip(self.variables, values, strict=True):
            # A number is no array.
            shape = tuple(value.shape) if hasattr(value, "shape") else None
            if shape != tuple(variable.shape):
                raise ValueError(
                    f"The state of optimizer '{self.name}' doesn't fit, and "
                    f"nothing of it was loaded: variable '{variable.path}' "
                    f"has shape {tuple(variable.shape)}. Received: "
                    f"{'no array' if shape is None else f'shape {shape}'}. "
                    "Load it with the model and the optimizer's arguments "
                    "that it was saved with, or load the model alone, for "
                    "instance by `load_model(path, compile=False)`."
                )

    def _index_of(self, variable):
        try:
            return self._get_variable_index(variable)
        # The latter on TensorFlow, for what is no variable.
        except (KeyError, AttributeError):
            return None

    def _has_own_update_step(self):
        """Whether a subclass has another rule than this class."""
        return type(self).update_step is not AdaFisher.update_step

    def _fisher(self, index):
        return self._fishers[index]() + self.damping

    def _updates_before(self, step):
        return step // (self.gradient_accumulation_steps or 1)

    def _is_measuring(self, step):
        """Whether the factors are measured at a step, counted from 0."""
        if self.factor_update_steps == 1:
            return True
        return self._updates_before(step) % self.factor_update_steps == 0

    def _update_factors(self, answers, step):
        """Take in what the probes answered.

        Args:
            answers: Dict from the id of a probe's variable to its gradient.
            step: The number of this step, counted from 0.
        """
        measuring = self._is_measuring_now
        if measuring is False:
            return
        found = self._answers_by_probe(answers)
        probes = [c.probe for c in self._curvatures if id(c.probe) in found]
        count = self.gradient_accumulation_steps or 1
        if count == 1 or backend.is_traced(step) or step % count == 0:
            self._measured = set()
        # By all steps of an update so far.
        self._measured |= {
            curvature.key
            for curvature in self._curvatures
            if id(curvature.probe) in found
        }
        # Without an answer for any use of a weight, its gradient has to do.
        self._unmeasured = {
            id(curvature)
            for curvature in self._curvatures
            if curvature.key not in self._measured
        }
        for curvature in self._curvatures:
            if id(curvature) not in self._unmeasured:
                curvature.is_estimated = False
        self._warn_of_missing_answers()
        if not probes:
            return

        # All in one list, so that they can travel together.
        sums = backend.sum_over_replicas(
            probes, [found[id(probe)] for probe in probes], measuring
        )
        answered = dict(zip(map(id, probes), sums, strict=True))
        factors = self._factors

        # The scale of the loss is the scale of `s`.
        scale = self._loss_scale_now() * count

        def taken_in(total):
            return factors.taken_in(
                total, scale, self.epsilon, self.gamma_1, self.gamma_2
            )

        def new_values():
            total = factors.join(answered)
            if count == 1:
                return taken_in(total)
            is_last = (step + 1) % count == 0
            total, rest = factors.add(total, is_last)
            values = backend.cond(
                is_last,
                lambda: taken_in(total),
                lambda: list(map(ops.convert_to_tensor, factors.variables[:2])),
            )
            return [*values, rest]

        self._assign_if(measuring, factors.variables, new_values)

    def _answers_by_probe(self, answers):
        """Dict from the id of each probe that has answered to its answer."""
        step = steps.current()
        found = {}
        for curvature in self._curvatures:
            probe = curvature.probe
            answer = backend.answer_of(probe, answers)
            # JAX has a gradient, of zeros, for what isn't used too.
            if step is not None and id(probe) not in step.answering:
                answer = None
            if answer is not None:
                found[id(probe)] = answer
        return found

    def _warn_of_missing_answers(self):
        """Warn once if no layer has reported what should have been seen."""
        seen = [c for c in self._curvatures if c.probe.is_seen]
        if self._has_warned or not seen:
            return
        if all(id(curvature) in self._unmeasured for curvature in seen):
            self._has_warned = True
            warnings.warn(
                "AdaFisher is at a step at which it measures its Kronecker "
                "factors, but no layer has reported anything. It estimates "
                "them from the weights' gradients. " + backend.HOW_TO_MEASURE,
                stacklevel=4,
            )

    def _loss_scale_now(self):
        """What the loss is multiplied by: a float or, if it varies, a tensor.

        Without `epsilon`, the normalization of the factors undoes it, and a
        scale that varies isn't read.
        """
        variable = self._loss_scale()
        if variable is None or not self.epsilon:
            return float(self.loss_scale_factor or 1)
        step = steps.current()
        if step is None:
            return ops.convert_to_tensor(variable)
        return step.value_of(variable)

    def _assign_if(self, condition, variables, new_values):
        """Set variables to what a function returns, or leave them."""
        if condition is False or steps.mode() == "plain":
            return

        def laid_out(values):
            return list(map(backend.keep_layout, values, variables))

        if steps.mode() == "measure" or condition is True:
            # If there is a condition, it is around the whole step already.
            values = new_values()
            if condition is not True:
                values = [
                    ops.where(condition, value, ops.convert_to_tensor(variable))
                    for variable, value in zip(variables, values, strict=True)
                ]
        else:
            values = backend.cond(
                condition,
                lambda: laid_out(new_values()),
                lambda: laid_out(map(ops.convert_to_tensor, variables)),
            )
        for variable, value in zip(variables, laid_out(values), strict=True):
            self.assign(variable, value)


@keras.saving.register_keras_serializable(package="keras_adafisher")
class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay.

    `AdaFisher` with another default:

        theta <- theta - learning_rate * (clip(m / F / rms(g / F), -1, 1)
                                          + weight_decay * theta)

    where `F = H * S + damping`. With `rms_decay=None`, as published, the
    first term is `m / F`.

    References:
        - [Martins Gomes et al., ICLR 2025](https://arxiv.org/abs/2405.16397)

    Args:
        weight_decay: Float. Defaults to `0.1`.

    All other arguments are those of `keras_adafisher.AdaFisher`.
    """

    def __init__(
        self,
        learning_rate=0.003,
        beta=0.9,
        damping=1.0,
        gamma_1=0.2,
        gamma_2=0.2,
        factor_update_steps=10,
        epsilon=0.0,
        normalization="mean",
        nesterov=True,
        rms_decay=0.99,
        adam_beta_2=0.999,
        adam_epsilon=1e-7,
        weight_decay=0.1,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        name=None,
        **kwargs,
    ):
        arguments.check("weight_decay", weight_decay, is_optional=False)
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


# `keras.optimizers.get("adafisher")` looks names up as they are written.
for _class in (AdaFisher, AdaFisherW):
    keras.saving.get_custom_objects()[_class.__name__] = _class
    keras.saving.get_custom_objects()[_class.__name__.lower()] = _class


def _list_of_variables(variables):
    try:
        found = list(variables)
    except TypeError:
        found = [None]
    # Variables of TensorFlow count too.
    if not all(hasattr(variable, "assign") for variable in found):
        raise TypeError(
            "Argument `variables` of `build` must be a list of variables: "
            "`model.trainable_variables` of a wrapped model. "
            f"Received: variables={variables} (of type {type(variables)})"
        )
    return found


def _past_the_largest(step):
    """The number of a step, a float, also where the counter ran over.

    JAX and PyTorch count in int32. Past the largest one comes the smallest,
    and a bias correction of a negative step would stop the training. Any large
    number corrects nothing.
    """
    return ops.where(step > 0, step, 2.0**31)
