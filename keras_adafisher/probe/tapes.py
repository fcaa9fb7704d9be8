"""Which backward passes gradients come from, on TensorFlow.

A training step may have several: two networks, or a first pass whose gradients
only say where to compute the second. What a tape has returned with gradients
counts for an optimizer that is given these, or something made of them, a
clipped copy or a sum.
"""

import tensorflow as tf


class Passes:
    """The backward passes of one training step."""

    def __init__(self):
        self._count = 0
        # By the keys of tensors: the number of the pass that has returned it,
        # and the set of those that it is made of.
        self._numbers = {}
        self._behind = {}
        # The key of an eager tensor is its id, which another one may get.
        self._tensors = []

    def add(self, gradients):
        """Take notice of what a tape has returned.

        Args:
            gradients: List of tensors, `tf.IndexedSlices` or `None`.

        Returns:
            Int, the number of the pass.
        """
        number = self._count
        self._count += 1
        for gradient in gradients:
            tensor = _tensor_of(gradient)
            if tensor is not None:
                self._tensors.append(tensor)
                self._numbers[_key(tensor)] = number
        return number

    def behind(self, gradient):
        """The passes that a gradient comes from.

        Args:
            gradient: Tensor, `tf.IndexedSlices` or `None`.

        Returns:
            Set of ints. It is empty if nothing is known: of a tensor that was
            computed eagerly, or read from a variable.
        """
        tensor = _tensor_of(gradient)
        if tensor is None:
            return set()
        # What a tensor is computed from comes first.
        pending = [tensor]
        while pending:
            key = _key(pending[-1])
            if key not in self._behind and key in self._numbers:
                # What this pass itself was computed from doesn't count.
                self._behind[key] = {self._numbers[key]}
            if key in self._behind:
                pending.pop()
                continue
            inputs = _inputs_of(pending[-1])
            unknown = [x for x in inputs if _key(x) not in self._behind]
            if unknown:
                pending += unknown
                continue
            self._behind[key] = set().union(
                *(self._behind[_key(x)] for x in inputs)
            )
        return self._behind[_key(tensor)]


def is_known_here(tensor):
    """Whether a tensor can be used in the graph that is being made.

    What a loop, a branch or a function inside of the step has computed can't.
    """
    graph = _graph_of(tensor)
    if graph is None:
        # It was computed eagerly.
        return True
    if tf.executing_eagerly():
        return False
    here = tf.compat.v1.get_default_graph()
    while here is not None and here is not graph:
        here = getattr(here, "outer_graph", None)
    return here is graph


def _tensor_of(gradient):
    return getattr(gradient, "values", gradient)


def _graph_of(tensor):
    # An eager tensor has none.
    return getattr(tensor, "graph", None)


def _key(tensor):
    graph = _graph_of(tensor)
    return id(tensor) if graph is None else (id(graph), tensor.name)


def _inputs_of(tensor):
    graph = _graph_of(tensor)
    if graph is None:
        return []
    if tensor.op.type != "Placeholder":
        return list(tensor.op.inputs)
    # In a branch, it stands for a tensor of the graph around it.
    captures = getattr(graph, "captures", [])
    return [outer for outer, inner in captures if inner is tensor]
