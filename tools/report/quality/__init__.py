"""docs/quality.md and its plots, from what the benchmark found.

    make quality

runs the benchmark and then this. `--results` and `--output` are folders.
"""
