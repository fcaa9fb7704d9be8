"""What mkdocs does to the pages besides rendering them.

A line of a page that consists of a link to a section of README.md,

    [License](../README.md#license)

is replaced by that section, up to its first heading. On GitHub it is the link,
on the site the text, and the text exists once. The README names pages by their
paths, since a relative link is broken where PyPI shows it. Here they become
links.
"""

import pathlib
import re

import mkdocs.exceptions

ROOT = pathlib.Path(__file__).parents[1]
LINK = re.compile(
    r"^\[[^\]]*\]\((?:\.\./)+README\.md#([\w-]+)\)$", re.MULTILINE
)
PAGE = re.compile(r"`docs/([\w/]+\.md)`")


def on_page_markdown(markdown, page, **_):
    """Replace links to sections of the README by the sections."""
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(lambda match: _section(match[1], up), markdown)


def _section(anchor, up):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # A heading of level 2, and all up to the next one of any level.
    for part in re.split(r"^## ", readme, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        if _slug(title) == anchor:
            body, _, _ = body.partition("\n### ")
            return PAGE.sub(rf"[`docs/\1`]({up}\1)", body.strip("\n"))
    raise mkdocs.exceptions.PluginError(f"README.md has no section #{anchor}")


def _slug(title):
    return re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-")
