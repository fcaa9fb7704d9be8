"""What the other scripts for TensorFlow share: count all-reduces."""

import pathlib
import sys

from keras_adafisher.probe import probes_of

ROOT = pathlib.Path(__file__).parents[2]
for directory in ("tests", "examples/distributed"):
    sys.path.insert(0, str(ROOT / directory))


def collectives(function, local_replicas):
    """The all-reduces of a traced training step.

    Args:
        function: What `tf.function(...).get_concrete_function` returned.
        local_replicas: Int, each of which has its own operation in the graph.

    Returns:
        Tuple of their number at each step, and their number inside a branch
        that not each step takes.
    """
    graph = function.graph
    always = [op.type for op in graph.get_operations()]
    sometimes = [
        node.op
        for branch in graph.as_graph_def().library.function
        for node in branch.node_def
    ]
    return tuple(
        operations.count("CollectiveReduceV2") // local_replicas
        for operations in (always, sometimes)
    )


def costs(ours, momentum_sgd, model):
    """What AdaFisher sends in addition, as keys of the line of JSON.

    Args:
        ours, momentum_sgd: What `collectives` returned for the optimizers.
        model: Model, wrapped.
    """
    assert momentum_sgd[1] == 0
    probes = probes_of(model.trainable_variables)
    return {
        "extra_collectives_measuring": sum(ours) - momentum_sgd[0],
        "extra_collectives_other": ours[0] - momentum_sgd[0],
        "extra_bytes": 4 * sum(probe.size for probe in probes),
        "gradient_bytes": 4 * model.count_params(),
    }
