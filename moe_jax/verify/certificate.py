"""What was proven, of what, with which versions: a file for a paper's appendix."""

import datetime
import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.verify.alone import LIMIT
from moe_jax.verify.compare import LIMITS
from moe_jax.verify.run import Result, Row

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def content(
    raw: Mapping[str, Any], config_file: str, changes: Sequence[str], result: Result, verdict: str
) -> dict[str, Any]:
    """Returns the certificate as JSON values.

    The hash is of the config as it was resolved, keys sorted, before it was shrunk.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in PACKAGES}
    # A value may be a number of NumPy, which JSON does not take.
    one_device = [{**check._asdict(), "value": float(check.value)} for check in result.alone]
    return {
        "verdict": verdict,
        "proven": result.proven,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config_file,
        "set": list(changes),
        "moe": moe(raw),
        "config_sha256": config_hash(raw),
        "commit": commit(),
        "versions": versions,
        "steps": result.steps,
        "limits": {**LIMITS, "one device": LIMIT},
        "shrunk": [rule._asdict() for rule in result.rules],
        "one_device": one_device,
        "meshes": [mesh(row) for row in result.rows],
    }


def moe(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of the MoE layers was proven: router, ordering and dispatcher with their
    options, and the losses that are not 0.
    """
    block = raw["model"]["moe"]
    proven = {}
    for choice in ("router", "ordering", "dispatcher"):
        chosen = block[choice]
        # Only the block of what was chosen: the others had no part in it.
        proven[choice] = {chosen: block[f"{choice}s"][chosen]}
    proven["losses"] = {name: value for name, value in block["losses"].items() if value}
    return proven


def mesh(row: Row) -> dict[str, Any]:
    """Returns what was proven on one mesh, or why it was not."""
    worst = {}
    for check, deviation in row.deviations.items():
        worst[check] = {
            "value": deviation.value,
            "where": deviation.where,
            "step": deviation.step,
        }
    facts: dict[str, Any] = {
        "mesh": row.name,
        "refused": row.refused,
        "failure": row.failure,
        "deviations": worst,
    }
    if row.reader:
        facts["checkpoint"] = {"read_on": row.reader, "unequal_arrays": row.unequal}
    if row.rounded:
        facts["float32"] = row.rounded._asdict()
    return facts


def config_hash(raw: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a config, keys sorted."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def commit() -> str:
    """Returns the commit of the code that ran, "" outside of a git repository; it ends in "-dirty"
    when files differ from it.
    """
    # No tag matches --exclude=*, so that it describes the commit by its hash.
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def refuse_unwritable(path: Path) -> None:
    """Raises UserError where no file can be written, before minutes are spent on what it shall
    hold.

    It leaves no empty file behind.
    """
    # The file of an earlier proof must survive a proof that fails.
    existed = path.exists()
    try:
        # "a" leaves the content of an older certificate alone.
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as e:
        raise UserError(f"--certificate {path} cannot be written: {e.strerror}") from e


def write(path: Path, certificate: Mapping[str, Any]) -> None:
    """Writes the certificate as JSON, or as Markdown if the name ends in .md."""
    save(path, certificate, markdown, "--certificate ")


def save(
    path: Path,
    content: Mapping[str, Any],
    as_markdown: Callable[[Mapping[str, Any]], str],
    flag: str = "",
) -> None:
    """Writes JSON values as such, or as Markdown if the name ends in .md.

    `flag`: the one that named the file, for the UserError of a file that cannot be written.
    """
    text = as_markdown(content) if path.suffix == ".md" else json.dumps(content, indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"{flag}{path} cannot be written: {e.strerror}") from e


def markdown(certificate: Mapping[str, Any]) -> str:
    """Returns the certificate as Markdown."""
    facts = ("config", "config_sha256", "commit", "date", "steps")
    lines = ["# Certificate of mesh invariance", "", certificate["verdict"], ""]
    lines += [
        f"- {name.replace('_', ' ')}: {certificate[name]}" for name in facts if certificate[name]
    ]
    lines += [f"- set: `{change}`" for change in certificate["set"]]
    lines += [f"- {name}: `{json.dumps(value)}`" for name, value in certificate["moe"].items()]
    versions = [f"{name} {number}" for name, number in certificate["versions"].items()]
    lines += ["- " + ", ".join(versions), ""]
    rules = [rule.values() for rule in certificate["shrunk"]]
    lines += table(("key", "yours", "shrunk", "why"), rules)
    checks = list(LIMITS)
    limits = ["limit", *(f"{LIMITS[name]:.0e}" for name in checks)]
    # The first line of the table has the limits, each mesh one line below.
    meshes = [[mesh["mesh"], *_deviations(mesh, checks)] for mesh in certificate["meshes"]]
    lines += table(("mesh", *checks), [limits, *meshes])
    alone = []
    for check in certificate["one_device"]:
        value, limit = f"{check['value']:.1e}", f"{check['limit']:.0e}"
        alone.append((check["claim"], value, limit, check["note"]))
    lines += table(("on one device", "deviation", "limit", "note"), alone)
    return "\n".join(lines).strip()


def _deviations(mesh: Mapping[str, Any], checks: list[str]) -> list[str]:
    """Returns the cells of one mesh: its worst deviations, or why there are none."""
    worst = mesh["deviations"]
    if not worst:
        return [mesh["refused"] or mesh["failure"], *[""] * (len(checks) - 1)]
    return [f"{worst[name]['value']:.1e}" if name in worst else "-" for name in checks]


def table(head: Any, rows: Any) -> list[str]:
    """Returns the lines of a Markdown table, with an empty one behind it."""

    def line(cells):
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, rows), ""]
