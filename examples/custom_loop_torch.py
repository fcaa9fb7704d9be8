"""AdaFisher in a training loop of one's own, with PyTorch.

    python examples/custom_loop_torch.py

As in Keras' guide "Writing a training loop from scratch in PyTorch". The lines
that AdaFisher needs are marked.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from digits import load_digits
from digits import make_model

import keras_adafisher


def main():
    """Train and validate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs

    x_train, x_val, y_train, y_val = map(torch.from_numpy, load_digits())
    train_set = torch.utils.data.TensorDataset(x_train, y_train)
    batches = torch.utils.data.DataLoader(
        train_set, batch_size=64, shuffle=True
    )
    keras.utils.set_random_seed(0)
    model = make_model()
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    keras_adafisher.wrap(model)  # AdaFisher
    optimizer = keras_adafisher.AdaFisher()  # AdaFisher

    for epoch in range(epochs):
        print(f"Epoch {epoch + 1}/{epochs}")
        bar = keras.utils.Progbar(len(batches))
        for step, (x, y) in enumerate(batches):
            logits = model(x, training=True)
            loss = loss_fn(y, logits)
            model.zero_grad()
            loss.backward()
            variables = model.trainable_variables
            gradients = [v.value.grad for v in variables]
            with torch.no_grad():
                optimizer.apply(gradients, variables)
            bar.update(step + 1, values=[("loss", float(loss))])

    with torch.no_grad():
        predicted = model(x_val, training=False).argmax(dim=-1)
    accuracy = float((predicted == y_val).float().mean())
    print(f"Validation accuracy: {100 * accuracy:.2f} %")


if __name__ == "__main__":
    main()
