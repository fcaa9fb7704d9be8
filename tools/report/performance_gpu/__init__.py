"""docs/performance_gpu.md, from what `benchmarks/gpu.py` found.

    make bench-gpu

runs that and then this. `--results` and `--output` are folders. The page is
written anew, from the files of the results alone. It needs no package, so that
a machine that is there for its GPU can make it.
"""
