"""A character-level GPT on the source code of Python's standard library.

    KERAS_BACKEND=jax python examples/language_model.py

The corpus needs no download: it is the text of the modules that this Python
came with. A decoder-only transformer reads 64 characters and predicts each
next one. Trains it once with Adam and once with AdaFisherW, both with the
learning rate and the momentum that were best for a GPT in docs/quality.md, with
warm-up and decay and with their gradients clipped, as is usual for language
models. Prints how many bits each needs per character of text that it hasn't
seen, next to two baselines: guessing, and knowing only how frequent each
character is. Then lets AdaFisherW's model write on. The table is followed by
its text.
"""

import argparse
import pathlib
import sysconfig
import time

import keras
import numpy as np
import rich.console
import rich.table
from keras import layers
from keras import ops

import keras_adafisher

CHARACTERS = 128
CONTEXT = 64
BATCH = 32


def load_text(length):
    """The first characters of the standard library, as integers below 128."""
    text = bytearray()
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        text += source.encode("ascii", errors="replace")
        if len(text) >= length:
            break
    return np.frombuffer(bytes(text[:length]), "uint8").astype("int32")


def windows(text):
    """Pieces of the text, and the same pieces one character later."""
    count = (len(text) - 1) // CONTEXT
    x = text[: count * CONTEXT].reshape(count, CONTEXT)
    y = text[1 : count * CONTEXT + 1].reshape(count, CONTEXT)
    return x, y


class Embed(layers.Layer):
    """The sum of two embeddings, of the characters and of their positions."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.characters = layers.Embedding(CHARACTERS, width)
        self.positions = layers.Embedding(CONTEXT, width)

    def build(self, input_shape):
        self.characters.build(input_shape)
        self.positions.build((CONTEXT,))

    def call(self, ids):
        return self.characters(ids) + self.positions(ops.arange(CONTEXT))


def make_model(depth, width=64, heads=4):
    """The network. Nothing in it knows which optimizer it will meet."""
    ids = keras.Input((CONTEXT,), dtype="int32")
    x = Embed(width)(ids)
    for _ in range(depth):
        h = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(heads, width // heads)
        x += attention(h, h, use_causal_mask=True)
        h = layers.LayerNormalization()(x)
        h = layers.Dense(4 * width, activation="gelu")(h)
        x += layers.Dense(width)(h)
    x = layers.LayerNormalization()(x)
    return keras.Model(ids, layers.Dense(CHARACTERS)(x))


def schedule(peak, steps):
    """A learning rate that warms up over 5 % of the steps, then falls to 0."""
    warmup = max(1, steps // 20)
    return keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=peak, warmup_steps=warmup
    )


def train(optimizer, depth, train_data, validation_data, epochs):
    """Train the network from scratch.

    Returns:
        The trained model, its bits per character of the validation data, and
        the seconds that it took.
    """
    keras.utils.set_random_seed(0)
    model = make_model(depth)
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    start = time.perf_counter()
    history = model.fit(
        *train_data,
        batch_size=BATCH,
        epochs=epochs,
        validation_data=validation_data,
    )
    bits = history.history["val_loss"][-1] / np.log(2)
    return model, bits, time.perf_counter() - start


def bits_of_frequencies(train_text, validation_text):
    """Bits per character of whoever knows only how frequent each one is."""
    counts = np.bincount(train_text, minlength=CHARACTERS) + 1
    return -np.log2(counts / counts.sum())[validation_text].mean()


def write(model, start, length, temperature=0.5):
    """Continue a text, one character at a time."""
    rng = np.random.default_rng(0)
    text = list(start)
    for _ in range(length):
        window = np.array(text[-CONTEXT:])[None]
        padding = CONTEXT - window.shape[1]
        window = np.pad(window, ((0, 0), (0, padding)))
        logits = model.predict_on_batch(window)[0, -1 - padding]
        # Noise of this kind makes the maximum a sample.
        noise = rng.gumbel(size=CHARACTERS)
        text.append(int(np.argmax(logits / temperature + noise)))
    return bytes(text).decode("ascii")


def main():
    """Train with both optimizers, compare, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--depth", type=int, default=2, help="blocks")
    parser.add_argument("--characters", type=int, default=600_000)
    parser.add_argument("--write", type=int, default=400)
    parser.add_argument(
        "--quick", action="store_true", help="less than a minute"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs, arguments.depth = 1, 1
        arguments.characters, arguments.write = 100_000, 20

    text = load_text(arguments.characters)
    cut = len(text) * 9 // 10
    train_data, validation_data = windows(text[:cut]), windows(text[cut:])

    steps = arguments.epochs * -(-len(train_data[0]) // BATCH)
    optimizers = {
        "Adam": keras.optimizers.Adam(
            schedule(1e-2, steps), beta_1=0.8, global_clipnorm=1.0
        ),
        # the one line that differs
        "AdaFisherW": keras_adafisher.AdaFisherW(
            schedule(1e-2, steps), beta=0.8, global_clipnorm=1.0
        ),
    }
    ends = {}
    table = rich.table.Table(
        title=f"Language model, {arguments.epochs} epochs, "
        f"{keras.backend.backend()}"
    )
    table.add_column("Optimizer")
    table.add_column("Bits per character", justify="right")
    table.add_column("Seconds", justify="right")
    table.add_row("(guessing)", f"{np.log2(CHARACTERS):.3f}", "")
    frequencies = bits_of_frequencies(text[:cut], text[cut:])
    table.add_row("(frequencies)", f"{frequencies:.3f}", "")
    for name, optimizer in optimizers.items():
        print(f"\n{name}")
        model, bits, seconds = train(
            optimizer,
            arguments.depth,
            train_data,
            validation_data,
            arguments.epochs,
        )
        ends[name] = bits
        table.add_row(name, f"{bits:.3f}", f"{seconds:.1f}")

    share = keras_adafisher.coverage(model).factored_fraction
    print(f"\nKronecker factors for {100 * share:.0f} % of the parameters")
    rich.console.Console().print(table)
    print("AdaFisherW's model writes:\n")
    print(write(model, b"def ", arguments.write))
    print(
        "\nShown: a language model has factors in all of its layers, and ends "
        f"at {ends['AdaFisherW']:.3f} bits per character, with Adam at "
        f"{ends['Adam']:.3f}."
    )


if __name__ == "__main__":
    main()
