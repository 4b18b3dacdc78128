"""What was proven, of what, with which versions: a file for a paper's appendix."""

import datetime
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
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
    return {
        "verdict": verdict,
        "proven": result.proven,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config_file,
        "set": list(changes),
        "moe": moe(raw),
        "config_sha256": config_hash(raw),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "steps": result.steps,
        "limits": {**LIMITS, "one device": LIMIT},
        "shrunk": [rule._asdict() for rule in result.rules],
        "one_device": [{**check._asdict(), "value": float(check.value)} for check in result.alone],
        "meshes": [mesh(row) for row in result.rows],
    }


def moe(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of the MoE layers was proven: router, ordering and dispatcher with their
    options, and the losses that are not 0.
    """
    block = raw["model"]["moe"]
    chosen = {one: {block[one]: block[one + "s"][block[one]]} for one in ("router", "ordering")}
    chosen["dispatcher"] = {block["dispatcher"]: block["dispatchers"][block["dispatcher"]]}
    return chosen | {"losses": {name: value for name, value in block["losses"].items() if value}}


def mesh(row: Row) -> dict[str, Any]:
    """Returns what was proven on one mesh, or why it was not."""
    worst = {
        d.check: {"value": d.value, "where": d.where, "step": d.step}
        for d in row.deviations.values()
    }
    out: dict[str, Any] = {
        "mesh": row.name,
        "refused": row.refused,
        "failure": row.failure,
        "deviations": worst,
    }
    if row.reader:
        out["checkpoint"] = {"read_on": row.reader, "unequal_arrays": row.unequal}
    if row.rounded:
        out["float32"] = row.rounded._asdict()
    return out


def config_hash(raw: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a config, keys sorted."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def commit() -> str:
    """Returns the commit of the code that ran, "" outside of a git repository; it ends in "-dirty"
    when files differ from it.
    """
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def check(path: Path) -> None:
    """Raises UserError where no file can be written, before minutes are spent on what it shall
    hold.

    It leaves no empty file behind.
    """
    there = path.exists()
    try:
        with path.open("a"):
            pass
        if not there:
            path.unlink()
    except OSError as e:
        raise UserError(f"--certificate {path} cannot be written: {e.strerror}") from e


def write(path: Path, certificate: Mapping[str, Any]) -> None:
    """Writes the certificate as JSON, or as Markdown if the name ends in .md."""
    text = markdown(certificate) if path.suffix == ".md" else json.dumps(certificate, indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"--certificate {path} cannot be written: {e.strerror}") from e


def markdown(certificate: Mapping[str, Any]) -> str:
    """Returns the certificate as Markdown."""
    facts = ("config", "config_sha256", "commit", "date", "steps")
    lines = ["# Certificate of mesh invariance", "", certificate["verdict"], ""]
    lines += [
        f"- {name.replace('_', ' ')}: {certificate[name]}" for name in facts if certificate[name]
    ]
    lines += [f"- set: `{change}`" for change in certificate["set"]]
    lines += [f"- {name}: `{json.dumps(value)}`" for name, value in certificate["moe"].items()]
    lines += [
        "- " + ", ".join(f"{name} {number}" for name, number in certificate["versions"].items()),
        "",
    ]
    lines += _table(
        ("key", "yours", "shrunk", "why"), [rule.values() for rule in certificate["shrunk"]]
    )
    checks = list(LIMITS)
    meshes = [[m["mesh"], *_deviations(m, checks)] for m in certificate["meshes"]]
    lines += _table(
        ("mesh", *checks), [["limit", *(f"{LIMITS[name]:.0e}" for name in checks)], *meshes]
    )
    alone = [
        (c["claim"], f"{c['value']:.1e}", f"{c['limit']:.0e}", c["note"])
        for c in certificate["one_device"]
    ]
    return "\n".join(lines + _table(("on one device", "deviation", "limit", "note"), alone)).strip()


def _deviations(mesh: Mapping[str, Any], checks: list[str]) -> list[str]:
    """Returns the cells of one mesh: its worst deviations, or why there are none."""
    if not mesh["deviations"]:
        return [mesh["refused"] or mesh["failure"], *[""] * (len(checks) - 1)]
    found = mesh["deviations"]
    return [f"{found[name]['value']:.1e}" if name in found else "-" for name in checks]


def _table(head: Any, rows: Any) -> list[str]:
    def line(cells):
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, rows), ""]
