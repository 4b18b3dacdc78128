"""What was found of a foreign layer: the verdict, two tables, and the certificate."""

import datetime
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.text import Text

from moe_jax.runtime import shell
from moe_jax.terminal.table import Table, names, numbers
from moe_jax.verify import certificate
from moe_jax.verify.compare import largest
from moe_jax.verify.foreign.contract import Layer, Sizes
from moe_jax.verify.tables import judged, number

CHECKS = ("output", "drops", "gradient")
ONE_DEVICE = "one device"


def mesh_name(shape: Mapping[str, int]) -> str:
    """Returns the axes of a mesh that split something, as in "data 2 x expert 4"."""
    split = [f"{axis} {length}" for axis, length in shape.items() if length > 1]
    return " x ".join(split) or ONE_DEVICE


class Finding(NamedTuple):
    """Holds how far a layer is from plain arithmetic, in one check of one case on one mesh."""

    mesh: str
    case: str
    check: str
    value: float
    limit: float
    # The array whose gradient is the worst; "" in the other checks.
    where: str

    @property
    def sound(self) -> bool:
        # NaN is within no limit.
        return self.value <= self.limit


class Report(NamedTuple):
    """Everything that `check` found of a layer."""

    layer: Layer
    sizes: Sizes
    seed: int
    # Mesh by mesh, case by case.
    findings: list[Finding]
    # What the layer raised, by mesh.
    failures: dict[str, str]
    # Of the choices of all cases those without a place, and all of them: where none is dropped,
    # nothing is shown of capacity.
    dropped: tuple[int, int]

    @property
    def proven(self) -> bool:
        return bool(self.findings) and not self.failures and all(f.sound for f in self.findings)

    @property
    def meshes(self) -> list[str]:
        """Returns the meshes that were tried."""
        return list(dict.fromkeys([*(f.mesh for f in self.findings), *self.failures]))

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(f.case for f in self.findings))

    def worst(self, check: str, **where: str) -> Finding | None:
        """Returns the worst finding of a check; `where` is a mesh or a case. None where there is
        none.
        """
        found = {}
        for i, finding in enumerate(self.findings):
            if finding.check == check and where.items() <= finding._asdict().items():
                found[str(i)] = finding
        # NaN is the worst of all, as `largest` has it.
        name, _ = largest({i: finding.value for i, finding in found.items()})
        return found.get(name)

    def verdict(self) -> str:
        """Returns one line: proven, or what deviates first."""
        if self.proven:
            compared = [check for check in CHECKS if self.worst(check)]
            return (
                f"PROVEN: equals plain arithmetic ({', '.join(compared)}) in {len(self.cases)} "
                f"cases on {len(self.meshes)} mesh{'es' if len(self.meshes) > 1 else ''}"
            )
        # In the order in which they were tried: one device is the first.
        for mesh in self.meshes:
            wrong = [f for f in self.findings if f.mesh == mesh and not f.sound]
            if wrong:
                first = wrong[0]
                of = f" of {first.where}" if first.where else ""
                return (
                    f"DEVIATES: {mesh}, {first.case}: {first.check}{of} by {first.value:.1e} "
                    f"(limit {first.limit:.0e})"
                )
            if mesh in self.failures:
                return f"DEVIATES: {mesh} fails: {self.failures[mesh]}"
        return "DEVIATES: nothing was compared"

    def tables(self) -> Group:
        """Returns the worst deviations by mesh, and by case."""
        by_mesh, by_case = self._table("mesh", self.meshes), self._table("case", self.cases)
        failures = [Text(f"{mesh}: {text}", style="red") for mesh, text in self.failures.items()]
        worst = self.worst("gradient")
        caption = f"worst gradient: {worst.where}" if worst else "no gradient was compared"
        if self.layer.capacity is not None:
            caption += "; {} of {} choices have no place".format(*self.dropped)
        return Group(by_mesh, Text(caption, style="dim"), *failures, "", by_case)

    def _table(self, by: str, rows: list[str]) -> Table:
        """Returns the worst deviation of each check, in a line for each mesh or case."""
        title = f"largest deviation from plain arithmetic, by {by}"
        table = Table([*names(by), *numbers(*CHECKS)], title=title)
        limits = self.layer.limits
        table.add("limit", *(number(limits[check]) for check in CHECKS), style="dim")
        for row in rows:
            found = [self.worst(check, **{by: row}) for check in CHECKS]
            # Nothing was compared there: the layer raised.
            if not any(found):
                table.add(row, Text("fails", style="red"))
                continue
            table.add(row, *(judged(f.value, f.sound) if f else "-" for f in found))
        return table

    def show(self, console: Console | None = None) -> None:
        """Prints the tables and the verdict."""
        console = console or shell.console()
        colour = "green" if self.proven else "red"
        console.print(self.tables(), "")
        console.print(Text(self.verdict(), style=f"bold {colour}"))

    def content(self) -> dict[str, Any]:
        """Returns the certificate as JSON values."""
        layer = self.layer
        said = ("given", "k", "score", "renormalize", "scale", "activation", "capacity")
        said += ("group_tokens", "masks", "numpy", "dtype")
        versions = {"python": platform.python_version()}
        versions |= {name: version(name) for name in certificate.PACKAGES}
        return {
            "verdict": self.verdict(),
            "proven": self.proven,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "layer": _name(layer.forward),
            "said": {name: getattr(layer, name) for name in said},
            "specs": {name: str(spec) for name, spec in layer.specs.items()},
            "sizes": self.sizes._asdict(),
            "seed": self.seed,
            "commit": certificate.commit(),
            "versions": versions,
            "limits": layer.limits,
            "failures": self.failures,
            "dropped": dict(zip(("without_place", "choices"), self.dropped, strict=True)),
            "findings": [finding._asdict() for finding in self.findings],
        }

    def write(self, path: str | Path) -> None:
        """Writes the certificate as JSON, or as Markdown if the name ends in .md. UserError."""
        certificate.save(Path(path), self.content(), markdown)


def _name(function: Callable[..., Any]) -> str:
    """Returns where a function is defined; a partial one is what it is made of."""
    function = getattr(function, "func", function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def markdown(content: Mapping[str, Any]) -> str:
    """Returns a certificate as Markdown."""
    lines = ["# Certificate of a foreign layer", "", content["verdict"], ""]
    facts = ("layer", "said", "specs", "sizes", "seed", "dropped", "commit", "date", "versions")
    lines += [f"- {name}: `{content[name]}`" for name in facts if content[name]]
    lines += [f"- {mesh} fails: `{text}`" for mesh, text in content["failures"].items()]
    rows = [
        (f["mesh"], f["case"], f["check"], f"{f['value']:.1e}", f"{f['limit']:.0e}", f["where"])
        for f in content["findings"]
    ]
    head = ("mesh", "case", "check", "deviation", "limit", "worst")
    return "\n".join([*lines, "", *certificate.table(head, rows)]).strip()
