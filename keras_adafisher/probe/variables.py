"""Which probes belong to which variables, and lists of both."""


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
        List. On TensorFlow and PyTorch, where probes are in no list, an equal
        one.
    """
    known = {id(variable) for variable in variables}
    # What is estimated has no tap, and its probe never has a gradient.
    probes = [
        probe.variable
        for probe in probes_of(variables)
        if probe.is_listed and not probe.block.is_estimated
    ]
    return [*variables, *(v for v in probes if id(v) not in known)]


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
