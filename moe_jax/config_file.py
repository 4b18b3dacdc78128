"""Config files: Python files with `get_config(arg)`, executed where they lie. Run only those you trust."""

import importlib.util
import sys
from pathlib import Path

from ml_collections import ConfigDict

from moe_jax.errors import UserError


def load(path: Path) -> ConfigDict:
    """The config that `get_config()` of a file returns. Its directory's parent is importable, so `from configs import base` works."""
    if not path.is_file():
        raise UserError(f"the config file {path} does not exist")
    spec = importlib.util.spec_from_file_location("moe_jax_config_file", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module.get_config()


def defaults(path: Path) -> ConfigDict:
    """configs/base.py as it stands beside the config file, or below the current directory."""
    for folder in (path.resolve().parent, Path("configs").resolve()):
        if (folder / "base.py").is_file():
            return load(folder / "base.py")
    raise UserError(
        "configs/base.py is not there: run from the directory that has configs/, or keep base.py beside your config"
    )
