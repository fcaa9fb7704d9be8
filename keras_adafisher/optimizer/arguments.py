"""What the arguments of the optimizer may be, and what an error says else.

One table, `RULES`, serves the constructor and what is assigned later.
"""

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import re

import keras

from keras_adafisher.factors.normalization import NORMALIZATIONS


def is_integer(value):
    """Whether an argument is an integer: `True` isn't."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value):
    """Whether an argument is a real number: `True` isn't."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which values an argument may have.

    Attributes:
        allowed: String, what an error says after "must be".
        is_allowed: Callable from a value to a bool.
        kind: What a value is converted to: Keras' own arguments stay as they
            are. Defaults to `None`, no conversion.
        is_optional: Bool, whether `None` is allowed too. Defaults to `False`.
    """

    allowed: str
    is_allowed: collections.abc.Callable
    kind: type | None = None
    is_optional: bool = False

    def checked(self, name, value):
        """The value to keep.

        Args:
            name: String, the argument's name.
            value: What was given.

        Returns:
            The value, converted.

        Raises:
            ValueError: The value isn't allowed.
        """
        if value is None and self.is_optional:
            return None
        if value is None or not self.is_allowed(value):
            none = ". `None` is allowed too" if self.is_optional else ""
            raise ValueError(
                f"Argument `{name}` must be {self.allowed}. "
                f"Received: {name}={value}{none}"
            )
        return value if self.kind is None else self.kind(value)


def _decay_rate(**options):
    return Rule(
        "a float in the range [0, 1)",
        lambda value: is_number(value) and 0 <= value < 1,
        **options,
    )


def positive(**options):
    """The `Rule` of a float above zero."""
    return Rule(
        "a float > 0",
        lambda value: is_number(value) and 0 < value < math.inf,
        **options,
    )


def not_negative(**options):
    """The `Rule` of a float that may be zero."""
    return Rule(
        "a float >= 0",
        lambda value: is_number(value) and 0 <= value < math.inf,
        **options,
    )


def _integer(least, **options):
    return Rule(
        f"an integer >= {least}",
        lambda value: is_integer(value) and value >= least,
        **options,
    )


def _is_auto(value):
    # Arrays are compared entry by entry.
    return isinstance(value, str) and value == "auto"


def _are_patterns(value):
    if not isinstance(value, (list, tuple)):
        return False
    try:
        return all(isinstance(x, str) and re.compile(x) for x in value)
    except re.error:
        return False


RULES = {
    "beta": _decay_rate(kind=float),
    "damping": positive(kind=float),
    "gamma_1": _decay_rate(kind=float),
    "gamma_2": _decay_rate(kind=float),
    "factor_update_steps": _integer(1, kind=int),
    "epsilon": not_negative(kind=float),
    "normalization": Rule(
        " or ".join(f'"{name}"' for name in NORMALIZATIONS),
        lambda value: value in list(NORMALIZATIONS),
    ),
    "nesterov": Rule("a boolean", lambda value: isinstance(value, bool)),
    "rms_decay": _decay_rate(kind=float, is_optional=True),
    "adam_beta_2": _decay_rate(kind=float),
    "adam_epsilon": not_negative(kind=float),
    "adam_lr_ratio": positive(kind=float),
    "adam_weight_decay": not_negative(is_optional=True),
    "factor_damping": positive(kind=float),
    "kernel_update_steps": _integer(1, kind=int),
    # With each, rounding errors of a Gram matrix grow twelvefold.
    "ns_steps": Rule(
        "an integer from 1 to 6",
        lambda value: is_integer(value) and 1 <= value <= 6,
        kind=int,
    ),
    "keep_roots": Rule(
        'a boolean or "auto"',
        lambda value: isinstance(value, bool) or _is_auto(value),
    ),
    "exclude_layers": Rule(
        "a list of strings, regular expressions",
        lambda value: _are_patterns(value),
        kind=list,
        is_optional=True,
    ),
    # Keras takes anything below, and the first step would fail or, with a NaN,
    # destroy the weights.
    "weight_decay": not_negative(is_optional=True),
    # For Keras, 0 is no clipping.
    "clipnorm": not_negative(is_optional=True),
    "clipvalue": not_negative(is_optional=True),
    "global_clipnorm": not_negative(is_optional=True),
    "ema_momentum": Rule(
        'a float in the range [0, 1] or "auto"',
        lambda value: _is_auto(value) or (is_number(value) and 0 <= value <= 1),
    ),
    "loss_scale_factor": positive(is_optional=True),
    "gradient_accumulation_steps": _integer(2, is_optional=True),
}

_WITHOUT_RULE = (
    "learning_rate",
    "use_ema",
    "ema_overwrite_frequency",
    "name",
)

# What other optimizers, and the authors' code, call them.
_GAMMAS = (
    "`gamma_1` and `gamma_2` (the authors' `gamma=0.8` is `gamma_1=0.92` and "
    "`gamma_2=0.008`)"
)
_OTHER_NAMES = {
    "lr": "`learning_rate`",
    "beta1": "`beta`",
    "beta_1": "`beta`",
    "betas": "`beta`",
    "momentum": "`beta`",
    "beta2": "`adam_beta_2` (of parameters without factors)",
    "beta_2": "`adam_beta_2` (of parameters without factors)",
    "lambda": "`damping`",
    "tcov": "`factor_update_steps`",
    "gamma": _GAMMAS,
    "gammas": _GAMMAS,
    "eps": "`epsilon`",
    "adam_beta_1": "`beta`",
}

# What `keras.optimizers.Muon` lets one choose and `AdaFisherMuon` doesn't.
_COEFFICIENT = "the polynomial is that of Keras' defaults"
_NOT_CHOSEN = {
    "rms_rate": "steps have the spectral scale",
    "exclude_embeddings": "embeddings are never orthogonalized",
    "muon_a": _COEFFICIENT,
    "muon_b": _COEFFICIENT,
    "muon_c": _COEFFICIENT,
}


def matches(patterns, path):
    """Whether regular expressions match a variable's or a layer's path.

    Keras leaves the model's name out of the paths of a model that is loaded. So
    "^stem/" matches "stem/kernel" and "model/stem/kernel".

    Args:
        patterns: List of strings, or `None`.
        path: String.

    Returns:
        Bool, whether one of them is found in the path, or in what is left of it
        without its first names.
    """
    names = path.split("/")
    endings = ["/".join(names[start:]) for start in range(len(names))]
    return any(
        re.search(pattern, ending)
        for pattern in patterns or ()
        for ending in endings
    )


class Hyperparameter:
    """An attribute of an optimizer whose values are checked.

    An optimizer has those only that its constructor has set.
    """

    def __init__(self, name):
        self.name = name

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        try:
            return vars(instance)[self.name]
        except KeyError:
            raise AttributeError(
                f"'{owner.__name__}' object has no attribute '{self.name}'"
            ) from None

    def __set__(self, instance, value):
        if self.name not in _arguments_of(type(instance)):
            # It would be kept, and nobody would read it.
            raise AttributeError(
                f"'{type(instance).__name__}' object has no attribute "
                f"'{self.name}', which is an argument of `AdaFisherMuon`. "
                f"Received: {self.name}={value}"
            )
        value = RULES[self.name].checked(self.name, value)
        attributes = vars(instance)
        is_fixed = attributes.get("built") and self.name in attributes
        if is_fixed and _variables_for(self.name, value) != _variables_for(
            self.name, attributes[self.name]
        ):
            raise ValueError(
                f"Argument `{self.name}` decides which variables the optimizer "
                "has, and can't be changed once it is built. Make a new "
                f"optimizer. Received: {self.name}={value}, and the optimizer "
                f"was built with {self.name}={attributes[self.name]}"
            )
        attributes[self.name] = value


_FIXED = (
    "normalization",
    "gradient_accumulation_steps",
    "keep_roots",
)


def _variables_for(name, value):
    """What an argument's value says about the optimizer's variables."""
    if name == "exclude_layers":
        return value or []
    if name in _FIXED:
        return value
    return value is None if name == "rms_decay" else None


class Hyperparameters:
    """Base class of optimizers: what is assigned later is checked, too."""


for _name in RULES:
    setattr(Hyperparameters, _name, Hyperparameter(_name))


def check(name, value, is_optional=None):
    """Raise a `ValueError` if an argument's value isn't allowed.

    Args:
        name: String, a key of `RULES`.
        value: What was given.
        is_optional: Bool. Defaults to what the rule says.

    Raises:
        ValueError: The value isn't allowed.
    """
    rule = RULES[name]
    if is_optional is not None:
        rule = dataclasses.replace(rule, is_optional=is_optional)
    rule.checked(name, value)


def check_learning_rate(value):
    """Refuse what Keras would take for a learning rate.

    Args:
        value: The argument `learning_rate`.

    Raises:
        TypeError: It is a model, a layer or parameters. The authors' code, and
            optimizers of PyTorch, are given such as their first argument. A
            layer is callable, and so a learning rate to Keras.
        ValueError: It is a negative float, infinite or NaN.
    """
    if _is_model_or_parameters(value):
        raise TypeError(
            "Argument `learning_rate` must be a float, a "
            "`LearningRateSchedule` or a callable without arguments. In Keras "
            "an optimizer isn't given the model or its parameters: "
            "`model.compile(optimizer=AdaFisher())` wraps the model, and the "
            "optimizer gets its variables when it is built. In a custom "
            "training loop, call `keras_adafisher.wrap(model)` and "
            "`optimizer.build(model.trainable_variables)`. "
            f"Received: learning_rate={value} (of type {type(value)})"
        )
    if isinstance(value, float) and not 0 <= value < math.inf:
        raise ValueError(
            "Argument `learning_rate` must be a float >= 0. "
            f"Received: learning_rate={value}"
        )


def list_of_variables(variables):
    """A list of what `build` is given.

    Args:
        variables: The argument `variables`.

    Raises:
        TypeError: It isn't a list of variables.
    """
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


def _is_model_or_parameters(value):
    # The latter is the method of a `torch.nn.Module`.
    if isinstance(value, keras.layers.Layer) or hasattr(value, "parameters"):
        return True
    if isinstance(value, collections.abc.Iterator):
        # `module.parameters()`
        return True
    if isinstance(value, (list, tuple, dict)):
        entries = value.values() if isinstance(value, dict) else value
        return any(
            # Variables of Keras and TensorFlow, PyTorch's parameters, and its
            # groups of parameters.
            hasattr(entry, "assign")
            or hasattr(entry, "requires_grad")
            or isinstance(entry, dict)
            for entry in entries
        )
    return False


def check_names(unknown, optimizer):
    """Refuse keyword arguments that there are none of.

    Args:
        unknown: Dict of what the constructor was given besides its arguments.
        optimizer: The class.

    Raises:
        ValueError: There is one that Keras doesn't know either. The error says
            which argument may have been meant.
    """
    # Keras warns of it.
    unknown = {name: v for name, v in unknown.items() if name != "decay"}
    if not unknown:
        return
    known = _arguments_of(optimizer)
    suggested = {name: _meant(name, known) for name in unknown}
    suggested = {name: meant for name, meant in suggested.items() if meant}
    if len(unknown) == 1:
        hints = [f"Did you mean {meant}?" for meant in suggested.values()]
    else:
        hints = [
            f"For `{name}`, did you mean {meant}?"
            for name, meant in suggested.items()
        ]
    if "ns_steps" in known:
        hints += [
            f"Leave `{name}` out: {_NOT_CHOSEN[name]}."
            for name in unknown
            if name in _NOT_CHOSEN
        ]
    hint = ". " + " ".join(hints) if hints else ""
    raise ValueError(f"Argument(s) not recognized: {unknown}{hint}")


@functools.cache
def _arguments_of(optimizer):
    """The names of a class' arguments, those of its bases included."""
    return frozenset(
        name
        for cls in optimizer.__mro__
        if "__init__" in vars(cls)
        for name in inspect.signature(cls.__init__).parameters
        if name in RULES or name in _WITHOUT_RULE
    )


def _meant(name, known):
    """What a name that isn't an argument's stands for, or `None`."""
    if name.lower() in _OTHER_NAMES:
        return _OTHER_NAMES[name.lower()]
    if name in RULES and name not in known:
        # All others have what `AdaFisher` has.
        return "`AdaFisherMuon`, which has this argument"
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    return f"`{close[0]}`" if close else None
