"""What the programs share that write pages. Imports no other package."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}

# What is between these lines of a page is written by a program.
_BEGIN, _END = "<!-- table -->\n", "<!-- end of table -->\n"


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
