"""What the wheel and the pages say of the project is what the project has."""

import ast
import fnmatch
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moe_jax"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_the_package_is_installed():
    """setuptools leaves a folder without __init__.py out of the wheel, without a word."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")} | {ROOT / "configs"}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_data_file_of_the_package_is_installed():
    patterns = SETTINGS["tool"]["setuptools"]["package-data"]
    for path in PACKAGE.rglob("*"):
        if path.is_dir() or path.suffix == ".py" or "__pycache__" in path.parts:
            continue
        room = ".".join(path.relative_to(ROOT).parent.parts)
        wanted = patterns.get(room, ())
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in wanted), (
            f"{path} is not in the wheel: add it to package-data in pyproject.toml"
        )


def test_the_lists_of_requirements_are_there():
    dynamic = SETTINGS["tool"]["setuptools"]["dynamic"]
    files = [dynamic["dependencies"], *dynamic["optional-dependencies"].values()]
    assert {entry["file"] for entry in files} == {
        f"requirements/{path.name}" for path in (ROOT / "requirements").glob("*.txt")
    }


def test_every_python_has_its_constraints():
    """The versions of CI, and those that pyproject.toml promises, have a file each."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tried = re.search(r"python: (\[.*\])", workflow)
    assert tried
    versions = ast.literal_eval(tried[1])
    names = {f"py{version.replace('.', '')}.txt" for version in versions}
    assert names == {path.name for path in (ROOT / "constraints").glob("*.txt")}
    promised = {line for line in SETTINGS["project"]["classifiers"] if ":: Python ::" in line}
    assert promised == {f"Programming Language :: Python :: {version}" for version in versions}


def test_the_index_has_every_page():
    text = (ROOT / "docs" / "index.md").read_text()
    linked = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in linked if not (ROOT / "docs" / link).exists()] == []
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages - set(linked) == set()


def test_the_citation_has_the_version():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    written = re.search(r'__version__ = "(.+)"', (PACKAGE / "version.py").read_text())
    assert cited and written and cited[1] == written[1]
