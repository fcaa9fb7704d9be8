"""Draw the pictures of docs/gallery.md.

    make docs-gallery

The page is a program, which the tests run like all pages. Here, each `figure`
that a block leaves becomes the picture that the page shows after the block.
"""

import argparse
import pathlib
import re

from tools.report import pages

PART = re.compile(
    r"^```python\n(?P<code>.*?)^```$|^!\[[^\]]*\]\((?P<picture>[^)]+)\)$",
    re.MULTILINE | re.DOTALL,
)


def parts(text):
    """The Python blocks and the pictures of a page, in its order.

    Args:
        text: String, the page.

    Returns:
        Iterable of pairs of strings, of which one is `None`: the code of a
        block, and the path of a picture.
    """
    for match in PART.finditer(text):
        yield match["code"], match["picture"]


def main():
    """Run the page and draw its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=pathlib.Path, default=pages.DOCS)
    parser.add_argument("--only", nargs="*", help="names of pictures")
    arguments = parser.parse_args()

    text = (pages.DOCS / "gallery.md").read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    for code, picture in parts(text):
        if code:
            # The reader's copy is a PDF in the working directory; the site's
            # is a picture of screen size.
            lines = code.splitlines()
            exec(
                "\n".join(line for line in lines if ".savefig(" not in line),
                namespace,
            )
            continue
        path = arguments.docs / picture
        if arguments.only and path.stem not in arguments.only:
            continue
        print(picture, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = namespace["figure"]
        # A column of a paper is narrow.
        dpi = 100 if figure.get_figwidth() > 4 else 200
        figure.savefig(path, dpi=dpi)


if __name__ == "__main__":
    main()
