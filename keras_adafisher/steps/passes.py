"""Which backward passes gradients come from, on TensorFlow.

A training step may have several: two networks, or a first pass whose gradients
only say where to compute the second. What a tape has returned with gradients
counts for an optimizer that is given these, or something made of them, a
clipped copy or a sum.
"""

import weakref

import tensorflow as tf


class Passes:
    """The backward passes of one training step."""

    def __init__(self):
        self._count = 0
        # From a graph and a tensor's name to the set of the passes that the
        # tensor is made of. That of what a tape has returned is its own.
        self._origins = weakref.WeakKeyDictionary()
        # From the id of an eager tensor that a tape has returned to a
        # reference to it, which nothing else keeps alive, and its pass.
        self._eager = {}

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
            if tensor is None:
                continue
            graph = graph_of(tensor)
            if graph is None:
                self._eager[id(tensor)] = weakref.ref(tensor), number
            else:
                self._origins.setdefault(graph, {})[tensor.name] = {number}
        return number

    def behind(self, gradient):
        """The passes that a gradient comes from.

        What a number comes from that it was multiplied by, a norm for
        instance, counts too, and so does all that a loop or a branch was given
        that it comes out of.

        Args:
            gradient: Tensor, `tf.IndexedSlices` or `None`.

        Returns:
            Set of ints. It is empty if nothing is known: of what was computed
            eagerly from what a tape has returned, or read from a variable.
        """
        tensor = _tensor_of(gradient)
        if tensor is None:
            return set()
        captures = {}
        # What a tensor is computed from comes first.
        pending = [tensor]
        while pending:
            known = self._known(pending[-1])
            if known is not None:
                pending.pop()
                continue
            inputs = _inputs_of(pending[-1], captures)
            origins = [self._known(x) for x in inputs]
            unknown = [
                x for x, o in zip(inputs, origins, strict=True) if o is None
            ]
            if unknown:
                pending += unknown
                continue
            found = self._origins.setdefault(graph_of(pending[-1]), {})
            found[pending[-1].name] = set().union(*origins)
        return self._known(tensor)

    def _known(self, tensor):
        """The passes that a tensor comes from, `None` if it isn't known yet."""
        graph = graph_of(tensor)
        if graph is not None:
            return self._origins.get(graph, {}).get(tensor.name)
        reference, number = self._eager.get(id(tensor), (None, None))
        is_same = reference is not None and reference() is tensor
        return {number} if is_same else set()


def graph_of(tensor):
    """The graph of a tensor, `None` if it was computed eagerly."""
    return getattr(tensor, "graph", None)


def present_graph():
    """The graph that is being made, `None` if all runs eagerly."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()


def is_around(graph):
    """Whether a graph is the one that is being made, or around it.

    Its tensors can be used there. What a loop, a branch or a function inside
    of a step has computed can't be used outside of it, and what was computed
    eagerly would be a constant in a graph.

    Args:
        graph: Graph, or `None` for what runs eagerly.
    """
    here = present_graph()
    if graph is None:
        return here is None
    while here is not None and here is not graph:
        here = getattr(here, "outer_graph", None)
    return here is graph


def _tensor_of(gradient):
    return getattr(gradient, "values", gradient)


def _inputs_of(tensor, captures):
    """What a tensor of a graph is computed from.

    Args:
        tensor: Tensor.
        captures: Dict, the caller's, in which to keep what was looked up.
    """
    if tensor.op.type != "Placeholder":
        return list(tensor.op.inputs)
    # In a branch, it stands for a tensor of the graph around it.
    graph = graph_of(tensor)
    if graph not in captures:
        captures[graph] = {
            inner.name: outer for outer, inner in getattr(graph, "captures", [])
        }
    outer = captures[graph].get(tensor.name)
    return [] if outer is None else [outer]
