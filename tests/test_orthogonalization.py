"""Orthogonalization as a function of matrices, against singular values."""

import numpy as np
import pytest
import reference
from keras import ops
from models import to_numpy

from keras_adafisher import backend
from keras_adafisher.optimizer.orthogonalization import fresh_steps
from keras_adafisher.optimizer.orthogonalization import inverse_root
from keras_adafisher.optimizer.orthogonalization import new_roots
from keras_adafisher.optimizer.orthogonalization import steps_along
from keras_adafisher.optimizer.orthogonalization import Whitened
from keras_adafisher.optimizer.orthogonalization import whitening
from keras_adafisher.optimizer.orthogonalization import whitenings
from keras_adafisher.optimizer.orthogonalization import without_units


def matrices(shape, values=None, seed=0):
    """Random matrices, with some singular values if they are given."""
    x = np.random.default_rng(seed).normal(size=shape)
    if values is not None:
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        x = (u * values) @ vt
    return x


def tensor(x):
    return ops.convert_to_tensor(np.asarray(x, "float32"))


def whitened(x, rows=1.0, columns=1.0):
    """One matrix, with scales of its rows and columns."""
    m, n = np.shape(x)
    return Whitened(
        without_units(tensor(x)[None]),
        tensor(np.broadcast_to(rows, m))[None, :, None],
        tensor(np.broadcast_to(columns, n))[None, None],
    )


def step_of(*args, steps=5):
    return to_numpy(fresh_steps([whitened(*args)], steps)[0])[0]


def orthogonalized(x, steps=5):
    return step_of(x, steps=steps)


def step_along(x, root):
    return to_numpy(steps_along([x], root)[0])[0]


SHAPES = [(1, 1), (1, 7), (7, 1), (3, 3), (5, 9), (9, 5), (16, 16), (60, 20)]


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_polynomial_of_the_singular_values(shape, steps):
    x = matrices(shape)
    np.testing.assert_allclose(
        orthogonalized(x, steps), reference.newton_schulz(x, steps), atol=3e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_nearest_semi_orthogonal_matrix(shape):
    x = matrices(shape, values=np.linspace(0.5, 1, min(shape)))
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    found = orthogonalized(x)
    # The same singular vectors, and values of 0.7 to 1.2 in place of ones.
    np.testing.assert_allclose(
        u.T @ found @ vt.T,
        np.diag(np.diag(u.T @ found @ vt.T)),
        atol=1e-5,
    )
    values = np.linalg.svd(found, compute_uv=False)
    assert values.min() > 0.67 and values.max() < 1.21
    assert np.linalg.norm(found - u @ vt) < 0.35 * np.sqrt(min(shape))


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (4, 4)])
def test_whitening_before_and_after(shape):
    rows, columns = np.linspace(0.5, 2, shape[0]), np.linspace(3, 1, shape[1])
    x = matrices(shape)
    scales = np.outer(rows, columns)
    np.testing.assert_allclose(
        step_of(x, rows, columns),
        scales * reference.newton_schulz(scales * x),
        atol=5e-5,
    )


@pytest.mark.parametrize("half, error", [("float16", 0.01), ("bfloat16", 0.1)])
@pytest.mark.parametrize("shape", [(4, 20), (20, 4), (7, 7), (64, 100)])
def test_half_precision_on_an_accelerator(shape, half, error, monkeypatch):
    """Of 11 or 8 bits: singular values are about one all the same."""
    x = matrices(shape, values=np.linspace(0.5, 1, min(shape)))
    expected = orthogonalized(x)
    monkeypatch.setattr(backend, "half_precision", lambda: half)
    found = orthogonalized(x)
    distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error / 100 < distance < error
    values = np.linalg.svd(found, compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("half, most", [("float16", 1.23), ("bfloat16", 1.4)])
@pytest.mark.parametrize("shape", [(96, 96), (64, 320), (320, 64)])
@pytest.mark.parametrize("steps", [5, 8])
def test_half_precision_of_any_singular_values(
    shape, half, most, steps, monkeypatch
):
    """None grows, also of those that half precision takes for noise."""
    monkeypatch.setattr(backend, "half_precision", lambda: half)
    for smallest in (1e-2, 1e-6):
        x = matrices(shape, values=np.geomspace(1, smallest, min(shape)))
        found = orthogonalized(x, steps)
        assert np.linalg.svd(found, compute_uv=False).max() < most


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_of_several_lengths(half, monkeypatch):
    """Their roots are worked out together."""
    monkeypatch.setattr(backend, "half_precision", lambda: half)
    lengths = [matrices(shape) for shape in ((6, 6), (6, 20), (30, 6))]
    found = fresh_steps([whitened(x) for x in lengths], 5)
    for x, step in zip(lengths, found, strict=True):
        expected = reference.newton_schulz(x)
        distance = np.linalg.norm(to_numpy(step)[0] - expected)
        assert distance < 0.1 * np.linalg.norm(expected)


def test_many_matrices_at_once():
    x = matrices((4, 6, 9))
    ones = tensor(np.ones((4, 6, 1))), tensor(np.ones((4, 1, 9)))
    each = np.stack([orthogonalized(matrix) for matrix in x])
    found = to_numpy(
        fresh_steps([Whitened(without_units(tensor(x)), *ones)], 5)[0]
    )
    np.testing.assert_allclose(found, each, atol=2e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_entries_of_any_size_and_any_rank(scale, rank):
    x = matrices((6, rank)) @ matrices((rank, 8), seed=1)
    x = x / np.abs(x).max()
    found = orthogonalized(x * scale)
    assert np.all(np.isfinite(found))
    if scale < 1e-30:
        # There is no room for what is computed from such entries.
        np.testing.assert_array_equal(found, 0)
        return
    values = np.linalg.svd(found, compute_uv=False)
    assert values.max() < 1.21
    # What isn't there stays away.
    assert np.all(values[rank:] < 1e-3)
    np.testing.assert_allclose(found, reference.newton_schulz(x), atol=1e-4)


def test_zeros_make_no_step():
    zeros = np.zeros((3, 5))
    np.testing.assert_array_equal(orthogonalized(zeros), zeros)
    root = tensor(np.eye(3))[None]
    np.testing.assert_array_equal(step_along(whitened(zeros), root), zeros)


def test_one_large_entry_hides_no_others():
    """Squares of entries of 1e30 aren't numbers in single precision."""
    x = np.diag([1e30, 1e30, 1e29])
    np.testing.assert_allclose(
        orthogonalized(x), reference.newton_schulz(x), atol=1e-5
    )


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_new_root_is_damped(shape):
    """By a hundredth of the mean eigenvalue of the Gram matrix."""
    x = matrices(shape)
    old = tensor(np.zeros((1, 3, 3)))
    found = to_numpy(new_roots([whitened(x)], 5, old))[0]
    expected = reference.kept_root(x if shape == (3, 5) else x.T, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
def test_an_old_root_stays_where_there_is_no_new_one(value):
    x = np.stack([np.full((2, 3), value), matrices((2, 3))])
    ones = tensor(np.ones((2, 2, 1))), tensor(np.ones((2, 1, 3)))
    old = np.stack([np.eye(2)] * 2)
    found = to_numpy(
        new_roots([Whitened(without_units(tensor(x)), *ones)], 5, tensor(old))
    )
    np.testing.assert_array_equal(found[0], np.eye(2))
    assert not np.allclose(found[1], np.eye(2))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_step_along_a_root(shape):
    """Whitened before it and after it, as a fresh one is."""
    x, side = matrices(shape), np.eye(3)
    rows, columns = np.linspace(0.5, 2, shape[0]), np.linspace(3, 1, shape[1])
    scales = np.outer(rows, columns)
    unit = scales * x / np.linalg.norm(scales * x)

    def step(root):
        return step_along(whitened(x, rows, columns), tensor(root)[None])

    np.testing.assert_allclose(step(1.5 * side), 1.5 * scales * unit, rtol=1e-5)
    # No longer than a semi-orthogonal matrix, whose singular values are 1.
    np.testing.assert_allclose(
        step(9 * side), 3**0.5 * scales * unit, rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_a_root_of_these_matrices_is_as_good_as_a_fresh_one(shape):
    """But for the damping, that is, which shortens small singular values."""
    x = matrices(shape, values=np.linspace(0.5, 1, 4))
    rows, columns = np.linspace(0.9, 1.1, shape[0]), 1.0
    here = whitened(x, rows, columns)
    root = new_roots([here], 5, tensor(np.zeros((1, 4, 4))))
    kept, fresh = step_along(here, root), step_of(x, rows, columns)
    assert np.linalg.norm(kept - fresh) < 0.15 * np.linalg.norm(fresh)


def test_whitening():
    factor = ops.convert_to_tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    found = to_numpy(whitening(factor, 1.0))
    # (0, 1, 2) + 1, over its mean of 2.
    expected = [np.array([0.5, 1, 1.5]) ** -0.5, [1, 1, 1]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_whitening_factors_of_several_lengths():
    factors = [
        matrices(shape, seed=seed) ** 2
        for seed, shape in enumerate([(1, 4), (2, 3), (3, 4)])
    ]
    found = whitenings(list(map(tensor, factors)), 0.5)
    for factor, one in zip(factors, found, strict=True):
        np.testing.assert_allclose(
            to_numpy(one), to_numpy(whitening(tensor(factor), 0.5)), rtol=1e-5
        )


def test_stacks_of_several_lengths_share_their_roots():
    """Long ones, next to one that is square and takes none."""
    shapes = [(5, 16), (16, 5), (5, 5)]
    x = [matrices(shape, seed=shape[0]) for shape in shapes]
    found = fresh_steps(list(map(whitened, x)), 5)
    for one, step in zip(x, found, strict=True):
        np.testing.assert_allclose(
            to_numpy(step)[0], reference.newton_schulz(one), atol=3e-5
        )


def test_an_inverse_root():
    """Of a matrix whose eigenvalues the polynomials take close to 1."""
    gram = np.diag([0.6, 0.3, 0.1])
    found = to_numpy(inverse_root(tensor(gram[None]), 5))[0]
    values = np.diag(found) * np.sqrt(np.diag(gram))
    assert np.all((values > 0.67) & (values < 1.21))
    np.testing.assert_allclose(found, np.diag(np.diag(found)), atol=1e-5)
