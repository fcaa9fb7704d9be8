"""How the optimizers meet Keras: models, layers, training steps."""
