"""`--config FILE --config.KEY=VALUE ...`: how every command is told a config.

Values are those of ml_collections: typed by the default of their key, tuples as Python writes them
(--config.model.period='("dense", "moe")'), text as it is.
"""

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from moe_jax.config import config_file
from moe_jax.errors import UserError

CHANGE = re.compile(r"--?(no)?config\.")
# A negative number is none.
FLAG = re.compile(r"--?[A-Za-z]")
HINT = " (python -m moe_jax.main --help lists the flags, python -m moe_jax config the keys)"
HELP = "config file, or the name of a shipped config; --config.KEY=VALUE changes a key"


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words that change keys of the config, and all others.

    The value of a key may be a word of its own, as in `--config.train.steps 5`. Raises UserError
    for `--set KEY=VALUE`, as changes were written once.
    """
    changes: list[str] = []
    others: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        # Old commands and scripts are told what to write now.
        if word == "--set" or word.startswith("--set="):
            change = word.removeprefix("--set").removeprefix("=") or (words or ["KEY=VALUE"])[0]
            raise UserError(f"--set {change}: write {spelled(change)}")
        if not CHANGE.match(word):
            others.append(word)
            continue
        changes.append(word)
        # A word without "=" has its value behind it; behind a switch comes a flag, or nothing.
        if "=" not in word and words and not FLAG.match(words[0]):
            changes.append(words.pop(0))
    return changes, others


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags of a command, and in `changes` the words that change its config.

    Adds --config to the parser.
    """
    parser.add_argument("--config", type=Path, required=True, help=HELP)
    changes, others = split(argv)
    return argparse.Namespace(**vars(parser.parse_args(others)), changes=changes)


def named(text: str, flag: str) -> tuple[str, list[str]]:
    """Returns the name and the changes of "NAME: --config.KEY=VALUE --config.KEY=VALUE".

    Quotes are those of the shell. Raises UserError, by the `flag`, when it is written otherwise.
    """
    name, _, rest = text.partition(":")
    try:
        changes, others = split(shlex.split(rest))
    except ValueError as error:
        # A quote that is not closed.
        raise UserError(f"{flag} {text}: {error}") from None
    if not others:
        return name, changes
    # Changes were written "KEY=VALUE;KEY=VALUE" once: the message has them as they are written now.
    old = [part for part in rest.split(";") if part]
    words = [spelled(part) for part in old] if all("=" in part for part in old) else []
    right = " ".join(words or ["--config.KEY=VALUE", "--config.KEY=VALUE"])
    raise UserError(f"{flag} {text}: write {flag} {_quoted(f'{name}: {right}')}")


def spelled(change: str) -> str:
    """Returns KEY=VALUE, VALUE a literal of Python, as a change is written."""
    key, _, value = change.strip().partition("=")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return shlex.quote(f"--config.{key}={value}")


def _quoted(text: str) -> str:
    """Returns a text as a word of the shell; in double quotes when it has single ones."""
    if "'" not in text:
        return shlex.quote(text)
    return '"' + re.sub(r'([\\"$`])', r"\\\1", text) + '"'


def words_of(values: Mapping[str, Any]) -> list[str]:
    """Returns the words that give keys these values."""
    return [f"--config.{key}={value}" for key, value in values.items()]


def text_of(values: Mapping[str, Any]) -> str:
    """Returns `words_of` as one text, quoted for the shell."""
    return " ".join(map(shlex.quote, words_of(values)))


def changed(config: ConfigDict, changes: Sequence[str]) -> dict[str, Any]:
    """Changes keys of a config, as words of a command line say, and returns their values by dotted
    key.

    Raises UserError for a key that there is not, or a value of another type.
    """
    # Flags of their own: absl's global ones are those of the training command.
    own = flags.FlagValues()
    # Flags and other words may stand in any order.
    own.set_gnu_getopt(True)
    argv = ["", *changes]
    try:
        # Defined, a flag takes its values: the words are parsed twice, first for their keys.
        config_flags.DEFINE_config_dict("config", config, flag_values=own, sys_argv=argv)
        rest = own(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(plain(error, changes) + HINT) from error
    if len(rest) > 1:
        raise UserError(f"what is {rest[1]!r}? Keys are written --config.{rest[1].lstrip('-')}")
    return dict(config_flags.get_override_values(own["config"]))


def read(path: Path, changes: Sequence[str]) -> dict[str, Any]:
    """Returns the config of a file or name, some keys changed, as a nested dict of JSON values.

    Raises UserError as `changed` does, and for an option of what is not chosen.
    """
    config = config_file.load(path)
    changed(config, changes)
    return config_file.values(config)


def plain(error: BaseException, words: Sequence[str]) -> str:
    """Returns one line of what absl or ml_collections say; a misspelt key by its whole path."""
    if wrong_key := config_file.misspelt(error):
        return f"the config file: {wrong_key}"
    # str() of a KeyError is the repr of its argument.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.replace("\\n", " ").replace("\\'", "'").split())
    # One word alone is a key that there is not.
    wrong = re.fullmatch(r"""\W*(\w+)\W*(?: Did you mean "(\w+)" instead of "\w+"\?)?\W*""", text)
    if not wrong:
        return text
    name, near = wrong.groups()
    keys = [word.partition("=")[0] for word in words]
    # The whole key that the user wrote, by the one part of it that is wrong.
    flag = next((key for key in keys if name in key.split(".")), name)
    hint = f': did you mean "{near}"?' if near else ""
    return f"no key is called {flag}{hint}"
