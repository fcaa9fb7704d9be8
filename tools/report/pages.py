"""What the programs share that write pages. Imports no other package."""

import argparse
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}

# What is between these lines of a page is written by a program.
_BEGIN, _END = "<!-- table -->\n", "<!-- end of table -->\n"


def parser(description, results=None):
    """A command line with the folders to read from and to write to.

    Args:
        description: String, what the program says of itself.
        results: String, the folder of `benchmarks/results` that is read by
            default. Defaults to `None`: the command line must say it.

    Returns:
        `argparse.ArgumentParser`, with `--results` and `--output`.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--results",
        type=pathlib.Path,
        required=results is None,
        default=results and ROOT / "benchmarks" / "results" / results,
    )
    made.add_argument("--output", type=pathlib.Path, default=DOCS)
    return made


def fill(program, name="page.md", **values):
    """The text of a template.

    Args:
        program: String, the path of the program that the template is beside.
        name: String, the template's file.
        **values: What its `{fields}` stand for.

    Returns:
        String.
    """
    template = pathlib.Path(program).with_name(name)
    return template.read_text(encoding="utf-8").format(**values)


def line(cells):
    """One row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(head, rows):
    """A table in Markdown, without an end of line."""
    rule = "|" + "---|" * len(head)
    return "\n".join([line(head), rule, *map(line, rows)])


def write(path, text):
    """Write a page with exactly one end of line at its end."""
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def replace_table(path, text):
    """Replace what is between the two comments of a page.

    Args:
        path: `pathlib.Path` of the page.
        text: String, the new lines.
    """
    before, rest = path.read_text(encoding="utf-8").split(_BEGIN)
    _, after = rest.split(_END)
    path.write_text(f"{before}{_BEGIN}{text}{_END}{after}", encoding="utf-8")
