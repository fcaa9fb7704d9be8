"""What the distributed examples share: data, a network, a comparison."""

import keras
import numpy as np
import sklearn.datasets

import keras_adafisher

BATCH_SIZE = 96  # Of all devices together. 2, 3, 4 and 8 divide it.
EXAMPLES = 1728  # 18 batches. The last 69 of the 1,797 images stay out.


def load_digits():
    """Images of shape (1728, 8, 8, 1) and labels of shape (1728,)."""
    digits = sklearn.datasets.load_digits()
    images = digits.images[..., None].astype("float32") / 16
    return images[:EXAMPLES], digits.target[:EXAMPLES].astype("int32")


def make_model():
    """A small network, with the same weights on each call.

    Without batch statistics: those of a part of the batch differ from those of
    the whole, so no optimizer could give the weights of one device.
    """
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu", name="conv"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu", name="hidden"),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(16, name="logits"),
        ]
    )


def make_optimizer():
    """Measures at every fifth step, so that a short run does it often."""
    return keras_adafisher.AdaFisher(factor_update_steps=5)


def make_loss():
    """Cross-entropy of the 10 digits (of 16 logits: 2 and 4 divide it)."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def state(model, optimizer):
    """The arrays that training changes, by name.

    Returns:
        Dict with the model's weights, and the optimizer's momentums and
        Kronecker factors.
    """
    variables = [*model.weights, *optimizer.variables]
    return {v.path: keras.ops.convert_to_numpy(v) for v in variables}


def difference(several, one):
    """The largest difference of an entry, relative to its array's largest.

    Args:
        several, one: Iterables of arrays.

    Returns:
        A float, NaN if any entry is.
    """
    # NumPy's maximum, since Python's passes over NaN.
    return float(
        np.max(
            [
                np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
                for a, b in zip(several, one, strict=True)
            ]
        )
    )


def report(devices, several, one):
    """Print how far training on several devices is from that on one.

    Args:
        devices: String, what trained.
        several, one: What `state` returned for each.
    """
    pairs = {"weights": [], "momentums": [], "Kronecker factors": []}
    for (path, a), b in zip(several.items(), one.values(), strict=True):
        if path.endswith(("iteration", "learning_rate")):
            continue
        kind = "weights"
        if path.endswith("_momentum"):
            kind = "momentums"
        elif path.endswith("/factors"):
            kind = "Kronecker factors"
        pairs[kind].append((a, b))
    print(f"\n{devices} against one device, same batches:")
    for kind, arrays in pairs.items():
        value = difference(*zip(*arrays, strict=True))
        print(f"  largest difference of the {kind}: {value:.1e}")
