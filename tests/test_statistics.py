import itertools

import keras
import numpy as np
import pytest
import reference
from keras import ops
from models import to_numpy

from keras_adafisher import statistics


def test_mean_square_by_hand():
    x = ops.convert_to_tensor(np.array([[1.0, -2.0], [3.0, 4.0]], "float32"))
    actual = to_numpy(statistics.mean_square(x, axis=(0,)))
    np.testing.assert_allclose(actual, [5.0, 10.0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_mean_square_adds_up_in_float32(dtype):
    # In float16, 300² overflows.
    x = ops.cast(np.full((8, 2), 300.0), dtype)
    actual = statistics.mean_square(x, axis=(0,))
    np.testing.assert_allclose(to_numpy(actual), [9e4, 9e4], rtol=1e-2)
    assert to_numpy(actual).dtype == "float32"


CASES = [
    case
    for case in itertools.product(
        [7, 8],  # size
        [1, 3],  # kernel
        [1, 2, 3],  # stride
        [1, 2],  # dilation
        ["valid", "same", "causal"],
    )
    # Keras allows a stride or a dilation, not both.
    if case[2] == 1 or case[3] == 1
]


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation", "pad"), CASES)
def test_window_mean_is_the_mean_over_patches(
    size, kernel, stride, dilation, pad, rng
):
    x = rng.normal(size=(size, 2)).astype("float32")
    # For the reference, one example with one spatial axis.
    patches = reference.patches(x[None], (kernel,), (stride,), (dilation,), pad)
    actual = statistics.window_mean(
        ops.convert_to_tensor(x), 0, kernel, stride, dilation, pad
    )
    np.testing.assert_allclose(
        to_numpy(actual), patches.mean(axis=0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="JAX and PyTorch trace no sizes that are unknown",
)
def test_patches_of_an_image_whose_size_is_unknown(rng):
    import tensorflow as tf

    arguments = (3, 2), (1, 2), (1, 1), "same"

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3))])
    def traced(x):
        return statistics.patch_mean_square(x, *arguments)

    for shape in [(2, 7, 9, 3), (1, 4, 6, 3)]:
        x = tf.constant(rng.normal(size=shape).astype("float32"))
        np.testing.assert_allclose(
            to_numpy(traced(x)),
            to_numpy(statistics.patch_mean_square(x, *arguments)),
            rtol=1e-6,
        )
