"""Write docs/performance_gpu.md."""

from tools.report import pages
from tools.report import performance_gpu
from tools.report.performance_gpu.page import page
from tools.report.performance_gpu.results import load
from tools.report.performance_gpu.results import load_compiled


def main():
    """Read the command line, and write the page."""
    parser = pages.parser(performance_gpu.__doc__, results="gpu")
    arguments = parser.parse_args()
    found = load(arguments.results)
    if not found:
        parser.error(
            f"{arguments.results} has no gpu-jax.json or gpu-torch.json"
        )
    text = page(found, load_compiled(arguments.results))
    pages.write(arguments.output / "performance_gpu.md", text)


if __name__ == "__main__":
    main()
