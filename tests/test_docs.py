"""The pages in docs/ say what is so."""

import ast
import contextlib
import functools
import importlib
import os
import pathlib
import re

import keras
import matplotlib
import pytest

import keras_adafisher
from keras_adafisher import analysis
from keras_adafisher import callbacks
from keras_adafisher import plotting
from keras_adafisher.wrappers import registry

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
BACKENDS = {"JAX": "jax", "TensorFlow": "tensorflow", "PyTorch": "torch"}
FENCE = re.compile(
    r"^```(\S*)(?: title=\"([^\"\n]*)\")?\n(.*?)^```$", re.M | re.S
)


def blocks(page, language):
    """Title and code of each fenced block of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[1] == language:
            # So that an error tells the line of the page.
            lines = text.count("\n", 0, match.start(3))
            yield match[2], "\n" * lines + match[3]


PAGES = [
    str(path.relative_to(DOCS))
    for path in sorted(DOCS.rglob("*.md"))
    if any(blocks(path, "python"))
]


# What everybody tries first.
FIRST_PAGES = ("../README.md", "getting_started.md")


def is_for_one_backend(page):
    """Whether a page has a block that some backend doesn't run."""
    return any(title in BACKENDS for title, _ in blocks(page, "python"))


@pytest.mark.parametrize(
    "page",
    [
        # The others are the same programs with each backend, and what they call
        # has tests on each.
        page
        if page in FIRST_PAGES or is_for_one_backend(page)
        else pytest.param(page, marks=pytest.mark.once)
        for page in ["../README.md", *PAGES]
    ],
)
def test_python_blocks_run(page, request, tmp_path, monkeypatch):
    """A page is one program. Titles name the backend that a block is for."""
    monkeypatch.setattr(registry, "_WRAPPERS", dict(registry._WRAPPERS))
    request.addfinalizer(lambda: keras.config.set_dtype_policy("float32"))
    namespace = {"__name__": "__main__"}
    with contextlib.chdir(tmp_path), matplotlib.rc_context({"backend": "agg"}):
        for title, code in blocks(page, "python"):
            backend = BACKENDS.get(title, keras.backend.backend())
            if backend == keras.backend.backend():
                exec(compile(code, DOCS / page, "exec"), namespace)


@pytest.mark.once
def test_there_are_pages():
    assert len(PAGES) >= 6


@functools.cache
def messages():
    """All strings of the package, with `…` for what is filled in."""
    found = []
    for path in (ROOT / "keras_adafisher").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", "") for part in node.values)
                found.append(
                    "".join(p if isinstance(p, str) else "…" for p in parts)
                )
    return found


@pytest.mark.once
@pytest.mark.parametrize(
    "quoted", [code.strip() for _, code in blocks("faq.md", "output")]
)
def test_quoted_messages_are_those_of_the_package(quoted):
    # Values that are filled in on the page may be a variable in the source.
    pattern = r"\S*".join(map(re.escape, re.split(r"…|damping(?=`|=)", quoted)))
    pattern = re.sub(r"factor_update_steps|weight_decay", r"\\S*", pattern)
    assert any(re.search(pattern, message) for message in messages())


@pytest.mark.once
def test_the_api_page_has_the_whole_public_api():
    documented = re.findall(
        r"^::: (\S+)$", (DOCS / "api.md").read_text("utf-8"), re.M
    )
    names = {path.rpartition(".")[2] for path in documented}
    public = set(keras_adafisher.__all__)
    for module in (analysis, callbacks, plotting):
        # Constants are explained where they matter.
        public |= {name for name in module.__all__ if not name.isupper()}
    assert public <= names
    # What a path names is there.
    for path in documented:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


@pytest.mark.once
def test_readme_sections_that_pages_show_exist():
    """`make docs` replaces links to sections of the README by the sections."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", readme, re.M)
    slugs = {
        re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles
    }
    shown = set()
    for path in DOCS.rglob("*.md"):
        shown |= set(
            re.findall(r"README\.md#([\w-]+)\)", path.read_text("utf-8"))
        )
    assert shown
    assert shown <= slugs


@pytest.mark.once
def test_links_in_the_readme_lead_somewhere():
    """Where PyPI shows it, no relative link does: one is a figure's."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert links == ["docs/quality/curves.svg"]
    for path in [*links, *re.findall(r"`((?:docs|examples)/[^`]*)`", readme)]:
        assert os.path.exists(ROOT / path), path


@pytest.mark.once
def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) < 900
    assert "make demo" in readme
    assert "make test" in readme


@pytest.mark.once
def test_the_versions_of_the_trust_page_are_those_that_are_tested():
    tested = {
        "oldest": constraints("constraints-oldest.txt"),
        "newest": constraints("constraints.txt"),
    }
    text = (DOCS / "trust.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w, ]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert rows == [
        (name, *(tested[age][package] for age in ("oldest", "newest")))
        for name, package in {
            "Keras": "keras",
            "JAX": "jax",
            "TensorFlow": "tensorflow",
            "PyTorch": "torch",
            "matplotlib, for pictures": "matplotlib",
        }.items()
    ]


def constraints(name):
    """Dict from each package of a constraints file to its version."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.M))
