"""A GAN whose two networks AdaFisher trains.

    KERAS_BACKEND=jax python examples/gan.py

Generator and discriminator each have an AdaFisher of their own. They share the
discriminator's layers: one optimizer trains them, the other one only passes
through. Each measures the Kronecker factors of its own steps. Prints how far
the distribution of generated digits is from that of the 1,797 real ones of
scikit-learn, before and after, and saves some of them to `gan.png`.
"""

import argparse

import keras
import matplotlib.pyplot as plt
import numpy as np
import scipy.linalg
import sklearn.datasets

import keras_adafisher

LATENT = 16
BATCH = 64


def make_generator():
    """From noise to an image of 64 pixels between 0 and 1."""
    return keras.Sequential(
        [
            keras.Input((LATENT,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Dense(64, activation="sigmoid"),
        ],
        name="generator",
    )


def make_discriminator():
    """From an image to the logit of its being real."""
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128),
            keras.layers.LeakyReLU(0.2),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(64),
            keras.layers.LeakyReLU(0.2),
            keras.layers.Dense(1),
        ],
        name="discriminator",
    )


def make_optimizer():
    """One for each network. Little momentum, as usual for GANs."""
    return keras_adafisher.AdaFisher(1e-3, beta=0.5)


def frechet_distance(a, b):
    """Squared Fréchet distance of two sets of images, each as a Gaussian."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    mean = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return mean + np.trace(cov_a + cov_b - 2 * root)


def main():
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--plot", default="gan.png")
    arguments = parser.parse_args()

    images = sklearn.datasets.load_digits().data.astype("float32") / 16
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    generator, discriminator = make_generator(), make_discriminator()
    discriminator.compile(make_optimizer(), loss=loss)
    noise = keras.Input((LATENT,))
    both = keras.Model(noise, discriminator(generator(noise)))
    both.compile(make_optimizer(), loss=loss)

    def draw(count):
        noise = rng.normal(size=(count, LATENT)).astype("float32")
        return generator.predict(noise, verbose=0)

    before = frechet_distance(draw(len(images)), images)
    real, fake = np.ones((BATCH, 1)), np.zeros((BATCH, 1))
    steps = len(images) // BATCH
    bar = keras.utils.Progbar(arguments.epochs * steps)
    for epoch in range(arguments.epochs):
        shuffled = rng.permutation(images)
        for step in range(steps):
            batch = shuffled[step * BATCH : (step + 1) * BATCH]
            d_loss = discriminator.train_on_batch(
                np.concatenate([batch, draw(BATCH)]),
                np.concatenate([0.9 * real, fake]),
            )
            noise = rng.normal(size=(BATCH, LATENT)).astype("float32")
            # What the generator's optimizer must not touch.
            discriminator.trainable = False
            g_loss = both.train_on_batch(noise, real)
            discriminator.trainable = True
            bar.update(
                epoch * steps + step + 1,
                [("discriminator", d_loss), ("generator", g_loss)],
            )

    after = frechet_distance(draw(len(images)), images)
    print(f"Squared Fréchet distance: {before:.2f} before, {after:.2f} after")
    figure, axes = plt.subplots(4, 12, figsize=(6, 2))
    for axis, image in zip(axes.flat, draw(48), strict=True):
        axis.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axis.axis("off")
    figure.savefig(arguments.plot, dpi=150)


if __name__ == "__main__":
    main()
