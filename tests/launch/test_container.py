"""The Dockerfile: what can be known of it without Docker."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
LINES = [line.split() for line in TEXT.splitlines() if line and not line.startswith("#")]


def of(instruction):
    return [words[1:] for words in LINES if words[0] == instruction]


def copied():
    return [source for *sources, _ in of("COPY") for source in sources]


def test_every_file_that_is_copied_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for source in copied():
        assert (ROOT / source).exists()
        assert f"!{source.split('/')[0]}" in ignored


def test_the_libraries_are_those_that_the_tests_passed_with():
    ((image,),) = of("FROM")
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", image)
    assert version
    install = next(words for words in of("RUN") if words[0] == "pip")
    constraints = install[install.index("-c") + 1]
    assert constraints == f"constraints/py{version[1].replace('.', '')}.txt"
    assert constraints in copied() and "requirements.txt" in install
    for extra in ("core", "cuda", "tpu"):  # --build-arg EXTRA
        assert (ROOT / f"requirements/{extra}.txt").exists()


def test_it_does_not_run_as_root():
    (user,) = of("USER")[-1]
    # Of the user in the manifests of Kubernetes, too.
    assert ["useradd", "--create-home", "--uid", "1000", user] in of("RUN")
    names = [words[0] for words in LINES]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))


@pytest.mark.full
def test_what_is_copied_is_enough(tmp_path):
    """A folder with these files alone, as in the image."""
    skip = shutil.ignore_patterns("__pycache__")
    for *sources, target in of("COPY"):
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target, ignore=skip)
            else:
                (tmp_path / target).mkdir(exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / target)
    done = subprocess.run(
        [sys.executable, "-m", "moe_jax.main", "--config", "configs/debug.py", "--dry_run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr
