"""Write docs/performance_gpu.md."""

import argparse
import pathlib

from tools.report import pages
from tools.report import performance_gpu
from tools.report.performance_gpu.page import page
from tools.report.performance_gpu.results import load


def main():
    """Read the command line, and write the page."""
    parser = argparse.ArgumentParser(description=performance_gpu.__doc__)
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=pages.ROOT / "benchmarks" / "results" / "gpu",
    )
    parser.add_argument("--output", type=pathlib.Path, default=pages.DOCS)
    arguments = parser.parse_args()
    found = load(arguments.results)
    if not found:
        parser.error(
            f"{arguments.results} has no gpu-jax.json or gpu-torch.json"
        )
    pages.write(arguments.output / "performance_gpu.md", page(found))


if __name__ == "__main__":
    main()
