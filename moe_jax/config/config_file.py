"""Reads config files, which are Python files with `get_config(arg)`: run only those you trust."""

import contextlib
import difflib
import importlib.util
import inspect
import json
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from moe_jax.config.build import refuse_unchosen
from moe_jax.config.tree import defaults
from moe_jax.errors import UserError

_PACKAGE = Path(__file__).parents[1]
# In a wheel the shipped configs are in the package, in the repository beside it.
SHIPPED = _PACKAGE / "configs"
if not SHIPPED.is_dir():
    SHIPPED = _PACKAGE.parent / "configs"


def shipped() -> list[str]:
    """Returns the names of the configs that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("[!_]*.py"))


def resolve(path: Path) -> Path:
    """Returns the file that --config names: a path as it is, a shipped config by its name.

    "vision:digits" becomes "configs/vision.py:digits". Raises UserError for a name that is unknown.
    """
    name, colon, arg = str(path).partition(":")
    if "/" in name or name.endswith(".py"):
        return path
    names = shipped()
    # A shipped config goes before a file of the same name that has no ending.
    if name in names:
        return Path(f"{SHIPPED / name}.py{colon}{arg}")
    if Path(name).exists():
        return path
    near = difflib.get_close_matches(name, names, 1)
    more = f"did you mean {near[0]}{colon}{arg}?" if near else f"choose one of {', '.join(names)}"
    raise UserError(
        f"--config {path}: no shipped config is called {name!r}, and no file; {more} (a file of "
        "your own ends in .py)"
    )


def refuse_unreadable(path: Path) -> None:
    """Raises UserError when there is no such file, or it is no Python."""
    if path.is_dir():
        raise UserError(f"the config file {path} is a directory: name a file in it")
    try:
        # Nothing is run yet: a fault of the language is told with its line.
        compile(path.read_bytes(), path, "exec")
    except FileNotFoundError:
        raise UserError(f"the config file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"the config file {path} cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        where = f"{path}, line {error.lineno}"
        raise UserError(f"the config file {where} is no Python: {error.msg}") from None
    except ValueError as error:
        # Bytes of value 0 are no text of a program.
        raise UserError(f"the config file {path} is no Python: {error}") from None


def load(path: Path) -> ConfigDict:
    """Returns the config that `get_config(arg)` of a file returns, ARG what follows a colon:
    "configs/vision.py:fashion_mnist", or by name "vision:fashion_mnist".

    Raises UserError, in one line, for whatever goes wrong in the file, and for a variant that it
    does not have.
    """
    path = resolve(path)
    name, colon, arg = str(path).partition(":")
    path = Path(name)
    with _told_in_a_line(path, arg if colon else None):
        module = _module(path)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(
                f"the config file has no attribute 'get_config': {path} needs a function of this "
                "name"
            )
        _refuse_variant(path, module, arg if colon else None)
        config = module.get_config(arg) if colon else module.get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"the config file {path}: get_config() returns a {type(config).__name__}, not the "
            "ConfigDict of moe_jax.config.defaults()"
        )
    return config


def variants(path: Path) -> tuple[str, ...]:
    """Returns the variants that a config file has; none where `path` names one of them already."""
    path = resolve(path)
    name, colon, _ = str(path).partition(":")
    if colon:
        return ()
    with _told_in_a_line(Path(name), None):
        return tuple(getattr(_module(Path(name)), "VARIANTS", None) or ())


def _module(path: Path) -> Any:
    """Returns the module that a config file makes."""
    refuse_unreadable(path)
    # Loaded from its path and left out of sys.modules, so that files of one name are told apart.
    spec = importlib.util.spec_from_file_location("moe_jax_config_file", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _told_in_a_line(path: Path, arg: str | None) -> Iterator[None]:
    """Turns whatever goes wrong in a config file, and with its variant, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(
            f"the config file {path} ends the program (SystemExit: {error.code}), it must return a "
            "config"
        ) from None
    except ImportError as error:
        more = ""
        if isinstance(error, ModuleNotFoundError) and error.name == "configs":
            more = (
                ": `from configs import base` works in a directory that has configs/; elsewhere "
                "take `from moe_jax.config import defaults` for base.get_config"
            )
        raise UserError(f"the config file {path} cannot be loaded: {error}{more}") from error
    # The file is a program: anything may go wrong in it.
    except Exception as error:
        if isinstance(error, KeyError) and arg is not None and error.args == (arg,):
            raise UserError(f"the config file {path} has no variant {arg!r}") from error
        if wrong_key := misspelt(error):
            raise UserError(f"the config file {path}: {wrong_key}") from error
        raise UserError(f"the config file {path}{_line(path, error)}: {plain(error)}") from error


def _refuse_variant(path: Path, module: Any, arg: str | None) -> None:
    """Raises UserError for an argument that is none of the module's VARIANTS, or that get_config
    does not take.

    A file that has no VARIANTS, and whose get_config takes an argument, makes of it what it likes.
    """
    if arg is None:
        return
    # A file may do with an argument what it likes, unless it says which there are.
    takes_argument = bool(inspect.signature(module.get_config).parameters)
    if takes_argument and not hasattr(module, "VARIANTS"):
        return
    variants = getattr(module, "VARIANTS", ())
    # None: any argument goes.
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
    """Returns ", line N" of the file where it went wrong; "" where that is not known."""
    # Other frames are of ml_collections, or of a file that this one imports.
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return f", line {lines[-1]}" if lines else ""


def plain(error: BaseException) -> str:
    """Returns the name of an error and what it says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def misspelt(error: BaseException) -> str:
    """Returns what ml_collections says in a paragraph of a key that a config file sets and that
    there is not, in a line; "" for other errors.
    """
    text = str(error.args[0]) if error.args else ""
    # It says so in a paragraph that lists all keys.
    wrong = re.search(r'Key "(\w+)" does not exist and cannot be added', text)
    near = re.search(r'Did you mean "(\w+)"', text)
    if not wrong:
        return ""
    hint = f': did you mean "{near[1]}"?' if near else ""
    return f'no key is called "{wrong[1]}"{hint}'


def read(path: Path, changes: Mapping[str, Any] | None = None, of: str = "") -> dict[str, Any]:
    """Returns the config of a file or name, some dotted keys changed, as a nested dict of JSON
    values.

    Raises UserError for a change that cannot be made, and for an option of what is not chosen; `of`
    begins what it says of a change, as in "cell a: ".
    """
    config = load(path)
    for key, value in (changes or {}).items():
        try:
            # A block is no key: it has keys.
            if isinstance(_at(config, key), ConfigDict):
                raise KeyError(key)
            with config.unlocked():
                config.update_from_flattened_dict({key: value})
        except (KeyError, AttributeError):
            keys = list(flatten_dict(config.to_dict(), sep="."))
            near = difflib.get_close_matches(key, keys, 1)
            more = f': did you mean "{near[0]}"?' if near else ""
            raise UserError(f"{of}{key} = {value!r}: no key is called {key}{more}") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{of}{key} = {value!r}: {error}") from None
    return values(config)


def values(config: ConfigDict) -> dict[str, Any]:
    """Returns a config as a nested dict of JSON values, so that what is compared on resume is what
    was saved.

    Raises UserError for an option of what is not chosen.
    """
    raw = as_json(config)
    refuse_unchosen(raw, default_values())
    return raw


def as_json(config: ConfigDict) -> dict[str, Any]:
    """Returns a config as a nested dict of JSON values."""
    # Written and read, so that tuples are lists, as in a file.
    return json.loads(json.dumps(config.to_dict()))


def default_values() -> dict[str, Any]:
    """Returns all defaults as a nested dict of JSON values."""
    return as_json(defaults())


def _at(config: Any, key: str) -> Any:
    """Returns the value, or the block, of a dotted key. Raises KeyError where there is none."""
    for part in key.split("."):
        config = config[part]
    return config
