"""`keras.RematScope`: not collected for TensorFlow.

There, Keras' rematerialization fails in a plain layer's training step, too.
"""

import keras
import numpy as np
from models import assert_close
from models import cross_entropy
from models import data
from models import weights

import keras_adafisher


def test_rematerialized_layers_train_like_others():
    x, y = data()

    def run(mode):
        keras.utils.set_random_seed(0)
        with keras.RematScope(mode=mode):
            model = keras.Sequential(
                [
                    keras.Input((6,)),
                    keras.layers.Dense(5, activation="tanh"),
                    keras.layers.Dense(3),
                ]
            )
        start = weights(model)
        model.compile(
            keras_adafisher.AdaFisher(1e-2, factor_update_steps=2),
            loss=cross_entropy(),
        )
        # Twice: the second compilation must not reuse the first one's trace.
        for _ in range(2):
            model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
            model.compile(model.optimizer, loss=cross_entropy())
        assert not np.allclose(weights(model)[0], start[0])
        return weights(model)

    assert_close(run("full"), run(None), 1e-6)
