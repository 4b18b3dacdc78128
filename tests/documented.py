"""The commands that are written in the documentation, read from its text: a new one is found by
being written.

A command is a line of a fenced or an indented block, or a span in backticks, that begins with
python, launch/local.sh or tensorboard. A row of README's table of flags is a command, too: what is
added to a training run.
"""

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/*.md", "experiments/README.md")
# Of these the docstrings are read.
PROGRAMS = (
    "configs/*.py",
    "experiments/*.py",
    "moe_jax/__main__.py",
    "moe_jax/main.py",
    "moe_jax/commands/*.py",
)
START = re.compile(r"(?:\S*/)?(?:python3?|launch/local\.sh|tensorboard)\s")
TRAIN = "python -m moe_jax.main"
QUICKSTART = f"{TRAIN} --config configs/quickstart.py"
TABLE = "README.md"  # has a table of flags


class Command(NamedTuple):
    """Where it is written, and as what."""

    source: str
    text: str

    @property
    def words(self) -> list[str]:
        """As the shell splits it; what stands after # is for people."""
        return shlex.split(self.text, comments=True)

    @property
    def module(self) -> str:
        """ "moe_jax.main", "moe_jax leak", "experiments.run", "tests/maps.py", "launch/local.sh",
        ...
        """
        first, *rest = self.words
        if not first.endswith(("python", "python3")):
            return first
        if rest[:1] != ["-m"]:
            return rest[0]
        return " ".join(rest[1:3]) if rest[1] == "moe_jax" else rest[1]

    @property
    def flags(self) -> list[str]:
        """What comes after the name of the program."""
        first, *rest = self.words
        if not first.endswith(("python", "python3")):
            return rest
        return rest[1 + len(self.module.split()) :] if rest[0] == "-m" else rest[1:]


def found() -> list[Command]:
    """Every command of every source, in the order of the text; what is written twice in a source
    comes once.
    """
    commands = [Command(name, command) for name, text in sources() for command in read(text)]
    commands += [Command(TABLE, command) for command in rows_of_flags((ROOT / TABLE).read_text())]
    return list(dict.fromkeys(commands))


def sources() -> list[tuple[str, str]]:
    """(path, text) of what is read."""
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    programs = [path for pattern in PROGRAMS for path in sorted(ROOT.glob(pattern))]

    def name(path):
        return str(path.relative_to(ROOT))

    def of_program(path):
        return ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""

    return [(name(path), path.read_text()) for path in pages] + [
        (name(path), of_program(path)) for path in programs
    ]


def read(text: str) -> list[str]:
    """Every command of a text."""
    text = re.sub(r"\\\n\s*", " ", text)  # a command goes on in the next line
    commands, fenced = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            commands += _of_line(line.strip())
        else:
            for span in re.findall(r"`([^`]+)`", line):
                commands += _of_line(span)
    return commands


def _of_line(line: str) -> list[str]:
    """The commands of a line of shell: several are joined by &&, and NAME=VALUE may stand before
    one.
    """
    parts = [re.sub(r"^(?:[A-Z_]+=\S+\s+)*", "", part.strip()) for part in line.split("&&")]
    return [part for part in parts if START.match(part)]


def rows_of_flags(text: str) -> list[str]:
    """Each row of the table of flags as the run that they are added to: the quickstart, where they
    name no config.
    """
    rows = [
        line.split("|")[2]
        for line in text.splitlines()
        if line.startswith("|") and line.count("|") == 3
    ]
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    found = [span.removesuffix(" ...") for span in spans if re.match(r"--\w", span)]
    return [f"{TRAIN if '--config ' in span else QUICKSTART} {span}" for span in found]
