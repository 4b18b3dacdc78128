"""Which router trains best at equal steps, how evenly does it load the experts, and what does it
cost?

    python experiments/routers.py \
        --out runs/routers            # all of them, about three minutes each on two CPU cores
    python experiments/routers.py \
        --out runs/routers top_k relu # some; what is already there is not run again
    python experiments/routers.py \
        --speed                       # times their training steps in turn, beside top_k's

Every router trains configs/quickstart.py for the same 500 steps, seed and data, changed by DELTAS.
Reported: held-out bits per byte (mean over domains; router as at evaluation), MaxVio of the batch
(mean over layers and the last 100 steps) and over the whole held-out set, dropped assignments, and
the experts of a token where a router does not fix them. One seed: gaps below 0.02 bits per byte are
not established. The loss of a router that sees the future is that of a model which cannot be
decoded.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # before jax is imported; the file may be typed as a script, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments import command_line

    command_line.hear_signals()

from experiments import run
from experiments.command_line import Flags, launch, made
from moe_jax.commands import bench
from moe_jax.config import command_line as config_flags
from moe_jax.errors import UserError
from moe_jax.terminal.table import Table

NO_BALANCE = {"model.moe.losses.balance": 0.0}
LEAKS = {"model.allow_leak": True}
# What a router needs beside its name: its own balance instead of the loss's, or leave to leak.
DELTAS = {
    "top_k": {},
    "switch": {},
    "noisy_top_k": {},
    "sigmoid": NO_BALANCE,
    "quantile": NO_BALANCE,
    "cosine": {},
    "multi_gate": {},  # two gates, by the parity of the position
    "null": {},
    "relu": NO_BALANCE | {"model.moe.losses.z": 0.0},
    "hash": NO_BALANCE,
    "uniform": NO_BALANCE,
    "random": NO_BALANCE,
    "expert_choice": NO_BALANCE | LEAKS,
    "base": NO_BALANCE | LEAKS,
    "soft": NO_BALANCE | LEAKS | {"model.moe.dispatcher": "slots"},
}


CONFIG = run.ROOT / "configs/quickstart.py"


def work(argv: list[str]) -> int | None:
    parser = Flags(__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/routers"), help="of the runs (default: %(default)s)"
    )
    parser.add_argument("--speed", action="store_true", help="times steps instead of training")
    parser.add_argument("--steps", type=int, default=500, help="of each run (default: %(default)s)")
    parser.add_argument("routers", nargs="*", help=f"some of {', '.join(DELTAS)} (default: all)")
    args = parser.parse_args(argv)
    chosen = args.routers or list(DELTAS)
    unknown = [router for router in chosen if router not in DELTAS]
    if unknown:
        raise UserError(
            f"{unknown[0]!r} is no router of this experiment: choose from {', '.join(DELTAS)}"
        )
    if args.speed:
        return speed(chosen, rounds=1 if args.smoke else 15)
    out, runs = made(args), grid(chosen, args.steps)._replace(smoke=args.smoke)
    run.run_all(runs, out)
    run.show(table({router: results(run.place(out, router, 0)) for router in chosen}))
    return None


def main(argv: list[str]) -> int:
    return launch(lambda: work(argv))


def grid(routers: Sequence[str], steps: int) -> run.Grid:
    """A cell for each router, with one seed."""
    cells = {router: {"model.moe.router": router} | DELTAS[router] for router in routers}
    return run.Grid(CONFIG, {"train.steps": steps}, cells, (0,))


def speed(routers: Sequence[str], rounds: int) -> int:
    variants = []
    for router in dict.fromkeys(["top_k", *routers]):
        keys = {"model.moe.router": router} | DELTAS[router]
        variants += ["--variant", f"{router}: {config_flags.text_of(keys)}"]
    return bench.main(["--config", str(CONFIG), "--rounds", str(rounds), *variants])


def results(workdir: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "moe/max_vio" in row][-10:]
    held_out = next(row for row in reversed(rows) if "eval/bits_per_byte" in row)

    def mean(name):
        return statistics.mean(row.get(name, math.nan) for row in training)

    return {
        "bits per byte": held_out["eval/bits_per_byte"],
        "train loss": mean("train/nll"),
        "MaxVio, batch": mean("moe/max_vio"),
        "MaxVio, held out": held_out.get("eval/max_vio", math.nan),
        "dropped": mean("moe/drop_fraction"),
        "experts per token": mean("moe/active"),  # of routers that do not fix it
    }


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def table(rows: dict[str, dict[str, float]]) -> Table:
    return run.table(
        {r: {name: number(value) for name, value in row.items()} for r, row in rows.items()},
        "router",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
