"""No module of moe_jax imports itself, directly or through others."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "moe_jax"


def dotted_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported_modules(path, names):
    """Names of the modules in `names` that a file imports anywhere in it, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports by a relative name"
            # `from moe_jax.data import pack` imports the module moe_jax.data.pack, where there is
            # one; else a name of the module moe_jax.data.
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            candidates = [name if name in names else node.module for name in submodules]
        else:
            continue
        yield from (name for name in candidates if name in names)


def circle(graph):
    """The modules of a circle in a graph {module: imported modules}, None without one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_no_module_imports_itself_through_others():
    paths = {dotted_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    graph = {name: set(imported_modules(path, paths)) for name, path in paths.items()}
    assert graph["moe_jax.data.tokenizer.bpe"] >= {"moe_jax.data.tokenizer.models"}
    found = circle(graph)
    assert found is None, " imports ".join(reversed(found))


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
