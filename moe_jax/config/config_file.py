"""Config files:

Python files with `get_config(arg)`, executed where they lie. Run only those you trust.
"""

import ast
import difflib
import importlib.util
import inspect
import json
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from moe_jax.config.build import refuse_unchosen
from moe_jax.errors import UserError


def check(path: Path) -> None:
    """UserError when there is no such file, or it is no Python."""
    if path.is_dir():
        raise UserError(f"the config file {path} is a directory: name a file in it")
    try:
        compile(path.read_bytes(), path, "exec")
    except FileNotFoundError:
        raise UserError(f"the config file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"the config file {path} cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        text, line = (
            (error.msg, f", line {error.lineno}") if isinstance(error, SyntaxError) else (error, "")
        )
        raise UserError(f"the config file {path}{line} is no Python: {text}") from None


def load(path: Path) -> ConfigDict:
    """The config that `get_config(arg)` of a file returns, ARG what follows a colon:

    "configs/vision.py:fashion_mnist".

    The directory's parent is importable, so `from configs import base` works. UserError, in one
    line, for whatever goes wrong in the file, and for a variant that it does not have.
    """
    name, colon, arg = str(path).partition(":")
    path = Path(name)
    check(path)
    spec = importlib.util.spec_from_file_location("moe_jax_config_file", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent.parent))
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(
                f"the config file has no attribute 'get_config': {path} needs a function of this "
                "name"
            )
        _refuse_variant(path, module, arg if colon else None)
        found = module.get_config(arg) if colon else module.get_config()
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(
            f"the config file {path} ends the program (SystemExit: {error.code}), it must return a "
            "config"
        ) from None
    except ImportError as error:
        raise UserError(f"the config file {path} cannot be loaded: {error}") from error
    except Exception as error:  # the file is a program: anything may go wrong in it
        if isinstance(error, KeyError) and colon and error.args == (arg,):
            raise UserError(f"the config file {path} has no variant {arg!r}") from error
        if wrong_key := misspelt(error):
            raise UserError(f"the config file {path}: {wrong_key}") from error
        raise UserError(f"the config file {path}{_line(path, error)}: {plain(error)}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(found, ConfigDict):
        raise UserError(
            f"the config file {path}: get_config() returns a {type(found).__name__}, not the "
            "ConfigDict of configs/base.py"
        )
    return found


def _refuse_variant(path: Path, module: Any, arg: str | None) -> None:
    """UserError for an argument that is none of the module's VARIANTS, or that get_config does not
    take.

    A file that has no VARIANTS, and whose get_config takes an argument, makes of it what it likes.
    """
    if arg is None:
        return
    takes = bool(inspect.signature(module.get_config).parameters)
    variants = getattr(module, "VARIANTS", None if takes else ())
    if variants is None or arg in variants:
        return
    if not variants:
        raise UserError(f"{path}:{arg}: the config file has no variants; name it as {path}")
    near = difflib.get_close_matches(arg, variants, 1)
    more = f"; did you mean {path}:{near[0]}?" if near else ""
    raise UserError(
        f"the config file {path} has no variant {arg!r}: it has {', '.join(variants)}{more}"
    )


def _line(path: Path, error: BaseException) -> str:
    """ ", line N" of the file where it went wrong; "" where that is not known."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return f", line {lines[-1]}" if lines else ""


def plain(error: BaseException) -> str:
    """The name of an error and what it says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def misspelt(error: BaseException) -> str:
    """What ml_collections says in a paragraph of a key that a config file sets and that there is
    not, in a line; "" for other errors.
    """
    text = str(error.args[0]) if error.args else ""
    wrong = re.search(r'Key "(\w+)" does not exist and cannot be added', text)
    near = re.search(r'Did you mean "(\w+)"', text)
    if not wrong:
        return ""
    return f'no key is called "{wrong[1]}"' + (f': did you mean "{near[1]}"?' if near else "")


def read(path: Path, changes: Sequence[str], flag: str) -> dict[str, Any]:
    """The config of a file as a nested dict of JSON values, with some keys changed:

    "KEY=VALUE" each, VALUE a Python literal or plain text.

    UserError for a change that cannot be made, by the `flag` that asked for it, and for an option
    of what is not chosen.
    """
    found = load(path)
    for change in changes:
        key, equals, value = change.partition("=")
        try:
            if not equals or isinstance(_at(found, key), ConfigDict):
                raise KeyError(key)
            with found.unlocked():
                found.update_from_flattened_dict({key: _literal(value)})
        except (KeyError, AttributeError):
            near = difflib.get_close_matches(key, _keys(found), 1)
            more = f': did you mean "{near[0]}"?' if near else ""
            raise UserError(
                f"{flag} {change}: write KEY=VALUE with a key of configs/base.py{more}"
            ) from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{flag} {change}: {error}") from None
    raw = json.loads(json.dumps(found.to_dict()))
    refuse_unchosen(raw, json.loads(json.dumps(defaults(path).to_dict())))
    return raw


def _keys(found: ConfigDict) -> list[str]:
    return list(flatten_dict(found.to_dict(), sep="."))


def _at(found: Any, key: str) -> Any:
    for part in key.split("."):
        found = found[part]
    return found


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def defaults(path: Path) -> ConfigDict:
    """configs/base.py as it stands beside the config file, or below the current directory."""
    for folder in (Path(str(path).partition(":")[0]).resolve().parent, Path("configs").resolve()):
        if (folder / "base.py").is_file():
            return load(folder / "base.py")
    raise UserError(
        "configs/base.py is not there: run from the directory that has configs/, or keep base.py "
        "beside your config"
    )
