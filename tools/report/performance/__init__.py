"""docs/performance.md and its plots, from what the benchmarks found.

    make bench

runs the benchmarks and then this. `--results` and `--output` are folders.
"""
