"""Fits scaling laws to the runs of studies, and says what the ladder cannot tell.

    python -m experiments.scaling dense_sparse_ladder --law clark
    python -m experiments.scaling granularity --law krajewski

The runs are read from the ledger of --out (experiments/run.py): those of the seeds that are
compared, at the learning rates that the searches chose. moe_jax/study/scaling.py has the laws.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before jax is imported; the file may be typed as a script, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments import command_line

    command_line.hear_signals()

from experiments import studies
from experiments.command_line import Parser, launch
from experiments.run import OUT
from moe_jax.errors import UserError
from moe_jax.runtime import shell
from moe_jax.study import ledger, progress, scaling
from moe_jax.terminal.table import Table, names, numbers


def work(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="studies")
    parser.add_argument("--law", choices=tuple(scaling.LAWS), default="clark")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    args = parser.parse_args(argv)
    done = ledger.done(ledger.read(args.out))
    points = []
    for name in studies.named(args.names):
        state = progress.look(studies.load(name), done)
        runs = [run for of_seed in state.runs.values() for run in of_seed.values()]
        points += [scaling.of_figures(run) for run in runs if run["loss"] is not None]
    if not points:
        raise UserError(f"--out {args.out} has no runs of {', '.join(args.names)}: train first")
    show(scaling.fit(args.law, points))
    largest = scaling.leave_largest_out(args.law, points)
    shell.tell(
        f"without the largest models (N = {largest.size:,.0f}) the law predicts "
        f"{largest.predicted:.4f} nats ({largest.low:.4f} to {largest.high:.4f}); measured "
        f"{largest.measured:.4f}: {'it holds' if largest.holds else 'it does not hold'}"
    )


def show(found: scaling.Fit) -> None:
    table = Table([*names("coefficient"), *numbers("value", "95 % from", "to")], title=found.law)
    for name, value in found.coefficients.items():
        table.add(name, f"{value:.4g}", f"{found.low[name]:.4g}", f"{found.high[name]:.4g}")
    shell.console().print(table)
    for sentence in found.unknown:
        shell.tell(sentence)


def main(argv: list[str]) -> int:
    return launch(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
