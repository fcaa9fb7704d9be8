"""The method as published: the settings of the authors' code."""

PUBLISHED = {
    "learning_rate": 1e-3,
    "damping": 1e-3,
    "gamma_1": 0.92,
    "gamma_2": 0.008,
    "factor_update_steps": 100,
    "epsilon": 1e-6,
    "normalization": "min_max",
    "nesterov": False,
    "rms_decay": None,
}
