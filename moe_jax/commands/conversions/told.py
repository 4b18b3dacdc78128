"""What the conversions tell of a new run: how far it is from the old one, and how it trains on."""

from pathlib import Path

import jax

from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.runtime import shell
from moe_jax.surgery import snapshot
from moe_jax.surgery.weights import gaps

# Two models whose outputs differ by less compute the same.
PROMISED = 1e-12


def positive(text: str, before: str) -> float | None:
    """Returns the positive number behind a word, as in "normal:0.02"; None where there is none."""
    try:
        value = float(text.removeprefix(before))
    except ValueError:
        return None
    return value if text.startswith(before) and 0 < value < float("inf") else None


def factor_on_moments(text: str) -> float:
    """Returns what moments are multiplied with; 0 = they begin anew. Raises UserError."""
    named = {"copy": 1.0, "zero": 0.0}
    factor = named[text] if text in named else positive(text, "scale:")
    if factor is None:
        raise UserError(f'--optimizer {text}: write "copy", "zero" or "scale:0.1"')
    return factor


def refuse_negative(flag: str, value: float) -> None:
    """Raises UserError for a number below 0, or one that is none."""
    if not 0 <= value < float("inf"):
        raise UserError(f"{flag} {value} must be a number of at least 0")


def tell_gap(
    old: snapshot.Snapshot,
    new: snapshot.Snapshot,
    exact: snapshot.Arrays,
    reasons: tuple[str, ...],
) -> float:
    """Tells how far the new model is from the old one and why, and returns the distance."""
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        before = snapshot.weights(old, old.arrays)
        models = [snapshot.weights(new, arrays) for arrays in (exact, new.arrays)]
        (far, stored), dropped = gaps(before, models)
    text = f"largest gap of outputs in float64: {far:.1e}"
    if stored > max(far, PROMISED):
        text += f" (as stored, in {new.config.model.param_dtype}: {stored:.1e})"
    shell.tell(text)
    if far <= PROMISED:
        shell.tell("the new model computes what the old one does")
        return far
    if dropped:
        shell.tell(
            f'not the same: dispatcher "{new.config.model.moe.dispatcher}" drops {dropped:.1%} of '
            "the assignments"
        )
    for reason in reasons:
        shell.tell(f"not the same: {reason}")
    return far


def tell_end(out: Path, *, goes_on: bool) -> None:
    """Tells how the new run is trained on."""
    workdir = out if goes_on else "NEW"
    shell.tell(
        f"written: {out} (train on: python -m moe_jax.main --config {out / 'config.py'} --workdir "
        f"{workdir})"
    )
