"""What is installed, and what importing it imports."""

import json
import re
import tarfile
import tomllib
import zipfile

import keras
import pytest
from processes import ROOT
from processes import run

import keras_adafisher

OPTIONAL = {
    "jax",
    "keras_hub",
    "matplotlib",
    "pandas",
    "scipy",
    "sklearn",
    "tensorflow",
    "torch",
}


def test_importing_imports_nothing_that_keras_did_not():
    """TensorFlow and PyTorch take seconds, and may not be there."""
    output = run(
        "-c",
        "import json, sys, keras\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import keras_adafisher\n"
        "after = {name.partition('.')[0] for name in sys.modules}\n"
        "print(json.dumps(sorted(after - before)))",
    )
    new = set(json.loads(output.splitlines()[-1]))
    assert "keras_adafisher" in new
    # Keras imports its backend, and some of Keras' own backends others.
    assert not new & OPTIONAL - {keras.backend.backend()}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    # Without isolation, which would download hatchling.
    run("-m", "build", "--no-isolation", f"--outdir={folder}", str(ROOT))
    return folder


@pytest.mark.once
def test_source_distribution_has_what_its_tests_need(distributions):
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "PKG-INFO",
        "README.md",
        "benchmarks/common.py",
        "constraints.txt",
        "constraints-oldest.txt",
        "docs/index.md",
        "examples/digits.py",
        "keras_adafisher/optimizer/adafisher.py",
        "mkdocs.yml",
        "pyproject.toml",
        "tests/conftest.py",
        "tests/golden/official.npz",
        "tools/report/pages.py",
        "tools/report/quality/page.md",
    }
    assert not [n for n in names if n.startswith(("site/", ".venv/", "dist/"))]
    assert not [n for n in names if "/results/" in n or "__pycache__" in n]


@pytest.mark.once
def test_wheel_has_the_package_only(distributions):
    (path,) = distributions.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (metadata,) = (n for n in names if n.endswith("/METADATA"))
        metadata = archive.read(metadata).decode()
    tops = {name.partition("/")[0] for name in names}
    version = keras_adafisher.__version__
    assert tops == {
        "keras_adafisher",
        f"keras_adafisher-{version}.dist-info",
    }
    assert "keras_adafisher/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert f"\nVersion: {version}\n" in metadata
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M)
    assert required == ["keras"]


@pytest.mark.once
def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    """`make test-oldest` installs them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [
        *project["dependencies"],
        *(extras[name][0] for name in ("tensorflow", "jax", "torch", "plot")),
    ]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for requirement in required:
        name, bound = requirement.split(">=")
        # "0.5" and "0.5.0" are the same.
        assert pinned[name] in (bound, f"{bound}.0")


@pytest.mark.once
def test_the_citation_has_the_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {keras_adafisher.__version__}\n" in citation
