"""Damped Fisher diagonals on PyTorch, of many parameters at once."""

import numpy as np
import torch

# Where one pass of `addcmul` with operands that are broadcast takes longer than
# a product and a sum.
_SLOW_ADDCMUL = {"cpu"}


class ScaledFactors:
    """Fisher diagonals times a number for each, as cheap as without it.

    `(H S + damping) * scale` is `(scale * H) S + scale * damping`: a product
    and a sum of small tensors, and one operation for each large one. On a GPU,
    starting an operation for each parameter is much of what an update takes.

    Args:
        vector: Float32 tensor of one axis, that of all factors.
        fishers: List of `FisherDiagonal`s.

    Attributes:
        vector: See above.
    """

    def __init__(self, vector, fishers):
        self.vector = vector
        self._fishers = fishers
        self._scaled = vector.clone()
        self._operands = {}
        # For each entry of the vector the diagonal that it is scaled for.
        owners = np.full(vector.numel(), -1)
        for place, fisher in enumerate(fishers):
            operands = _operands(fisher, vector, cut=None)
            if fisher.kept is None or fisher.kept[0] is not vector:
                # They are no views of the vector.
                continue
            first, second = operands
            start = first.storage_offset() - vector.storage_offset()
            own = owners[start : start + first.numel()]
            if not first.is_contiguous() or np.any(own >= 0):
                continue
            own[:] = place
            scaled = self._scaled.as_strided(first.shape, first.stride(), start)
            self._operands[place] = scaled, second
        owners = np.maximum(owners, 0).astype("int32")
        self._owners = torch.as_tensor(owners, device=vector.device)

    def update(self, scales, damping):
        """Scale anew.

        Args:
            scales: Float32 tensor of one axis, a scale for each diagonal.
            damping: Float.
        """
        scale_of_entries = torch.index_select(scales, 0, self._owners)
        torch.mul(self.vector, scale_of_entries, out=self._scaled)
        self._damping = damping
        self._scales = scales.unbind()
        self._dampings = (scales * damping).unbind()

    def denominators(self, places, cut=None):
        """The damped and scaled diagonals.

        Args:
            places: List of their numbers among all.
            cut: Slice of the first axis of the only one. Defaults to all.

        Returns:
            List of new float32 tensors that broadcast to the parameters.
        """
        if cut is not None:
            (place,) = places
            fishers = [self._fishers[place]]
            found = denominators_of(fishers, self._damping, cut)
            return torch._foreach_mul(found, [self._scales[place]])

        def other(number):
            place = places[number]
            damped = self._fishers[place]() + self._damping
            return damped * self._scales[place]

        return _sums(
            [self._operands.get(place) for place in places],
            [self._dampings[place] for place in places],
            other,
        )


def denominators_of(fishers, damping, cut=None):
    """List of new tensors, some damped Fisher diagonals."""
    vector = fishers[0].vector.value
    return _sums(
        [_operands(fisher, vector, cut) for fisher in fishers],
        damping,
        lambda i: fishers[i](cut) + damping,
    )


def _sums(operands, dampings, other):
    """List of new tensors, products of two operands and a damping each.

    Args:
        operands: List of pairs of float32 tensors that broadcast to each other,
            or of `None`.
        dampings: Float, or list of scalar tensors.
        other: Function of a place in these lists, of which there are no
            operands.
    """
    known = [i for i, pair in enumerate(operands) if pair is not None]
    sums = [None] * len(operands)
    if known:
        first, second = zip(*(operands[i] for i in known), strict=True)
        if isinstance(dampings, list):
            dampings = [dampings[i] for i in known]
        if first[0].device.type in _SLOW_ADDCMUL:
            found = torch._foreach_mul(first, second)
            torch._foreach_add_(found, dampings)
        else:
            if not isinstance(dampings, list):
                dampings = [first[0].new_full((), dampings)] * len(known)
            found = torch._foreach_addcmul(dampings, first, second)
        for i, value in zip(known, found, strict=True):
            sums[i] = value
    return [other(i) if x is None else x for i, x in enumerate(sums)]


def _operands(fisher, vector, cut):
    """`fisher.operands(cut)`, kept as long as they follow the factors."""
    if cut is not None:
        return fisher.operands(cut)
    # Another vector is that of a stateless call.
    if fisher.kept is None or fisher.kept[0] is not vector:
        operands = fisher.operands()
        if operands is None or not all(_is_view(x, vector) for x in operands):
            return operands
        fisher.kept = vector, operands
    return fisher.kept[1]


def _is_view(x, vector):
    return x.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
