"""Runs studies: trains the cells that are missing, judges the claims, and writes the results.

    python -m experiments.run                                # names all studies
    python -m experiments.run loss_free_bias --dry_run       # its cells, and how long they take
    python -m experiments.run loss_free_bias --local 2       # two processes on this machine
    python -m experiments.run switch_steps --slurm=--partition=gpu --slurm=--gres=gpu:1

A study is a declaration in experiments/studies/; docs/protocol.md has the protocol. A cell that is
in the ledger of --out is not trained again, and one that fails does not stop the others: the same
command goes on from there. Results are written to experiments/results/NAME, as far as they are
known (`--report` writes them and trains nothing), and docs/findings.md is made of them. `--smoke`
trains a few steps of every arm and writes nothing else.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # before jax is imported; the file may be typed as a script, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments import command_line

    command_line.hear_signals()

from experiments import studies, writing
from experiments.command_line import Flags, Interrupted, launch, made
from moe_jax.errors import UserError
from moe_jax.runtime import shell, signals
from moe_jax.study import expand, ledger, local, progress, results, slurm, train_cells
from moe_jax.study.contract import Cell, Study
from moe_jax.terminal.table import Table, names, numbers

OUT = Path("runs/studies")
RESULTS = writing.ROOT / "experiments/results"
FINDINGS = writing.ROOT / "docs/findings.md"
HEADING = """# Findings

What the studies of `experiments/studies/` found, by the protocol of [protocol.md](protocol.md).
This page is made of `experiments/results/` by the command that stands beside each question, and a
test says when it is stale."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Flags(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="studies; all = every one")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="ledger and programs (default: %(default)s)"
    )
    parser.add_argument("--dry_run", action="store_true", help="list the cells and end")
    parser.add_argument("--report", action="store_true", help="train nothing, write the results")
    parser.add_argument("--local", type=int, default=1, metavar="N", help="processes at once")
    parser.add_argument(
        "--slurm",
        action="append",
        nargs="?",
        const="",
        metavar="FLAG",
        help="submit the cells with sbatch, with this flag of its own; may be given several times",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.local < 1:
        raise UserError(f"--local {args.local} must be at least 1")
    return args


def work(argv: list[str]) -> int | None:
    args = parse(argv)
    if args.work:
        (word,) = args.names
        return work_on_pack(args.work, args.out, studies.load(word), short=args.smoke)
    if not args.names:
        shell.console().print(listing())
        return None
    chosen = [studies.load(name) for name in studies.named(args.names)]
    if args.dry_run:
        for study in chosen:
            dry_run(study, args.out, short=args.smoke)
        return None
    out = made(args)
    words = studies.named(args.names)
    codes = [run(study, word, out, args) for study, word in zip(chosen, words)]
    if not args.smoke and args.results == RESULTS:
        write_findings()
    return max(codes)


def work_on_pack(path: Path, out: Path, study: Study, *, short: bool) -> int:
    """Trains the cells of a pack in this process; returns its exit code.

    The process goes on with what the search of a learning rate asks for next, and with the seeds
    after it: they share its compiled program.
    """
    _, cells = local.read_pack(path)
    program = cells[0].program

    def following() -> list[Cell]:
        state = progress.look(study, ledger.done(ledger.read(out)), short=short)
        return [cell for cell in state.missing if cell.program == program]

    writing.compile_quickly(out / "compiled")
    return train_cells.run_pack(cells, study.name, out, following)


def run(study: Study, word: str, out: Path, args: argparse.Namespace) -> int:
    """Trains what is missing of a study and writes its results.

    `word` is what names the study on the command line. Returns 70 where a cell failed, else 0.
    """
    failed: set[str] = set()
    smoke = ["--smoke"] if args.smoke else []
    while not args.report:
        state = progress.look(study, ledger.done(ledger.read(out)), short=args.smoke)
        missing = [cell for cell in state.missing if cell.key not in failed]
        if not missing:
            break
        packs = expand.packs(missing)
        shell.tell(f"{study.name}: {len(missing)} cells in {len(packs)} processes")
        command = [*program(), word, "--out", str(out), *smoke, "--work"]
        if args.slurm is not None:
            flags = [flag for flag in args.slurm if flag]
            shell.tell(slurm.submit(packs, study.name, out, command, flags))
            shell.tell("when the jobs have ended, the same command writes the results")
            return 0
        train(packs, study.name, out, command, args.local)
        done = ledger.done(ledger.read(out))
        failed |= {cell.key for cell in missing if not ledger.find(done, cell)}
    state = progress.look(study, ledger.done(ledger.read(out)), short=args.smoke)
    if args.report and not state.lines:
        # Else the results of a ledger that is elsewhere would be written over with nothing.
        raise UserError(
            f"--report: no run of {study.name} is in the ledger of --out {out}, so nothing is "
            "written: name the --out of its runs, or train them without --report"
        )
    if args.smoke:
        trained = len(state.lines)
        shell.tell(f"{study.name}: {trained} of {len(study.arms)} arms train")
    else:
        folder = args.results / study.name
        results.write(folder, study, state)
        shell.tell(f"written: {folder / 'table.md'}, and figures.json and plot.png beside it")
        figures = results.collect(study, state)
        shell.console().print(results.verdict_table(figures["verdicts"]))
    if failed:
        shell.tell(f"{study.name}: {len(failed)} cells failed ({out / ledger.FOLDER})", sys.stderr)
    return 70 if failed else 0


def train(packs: list[list[Cell]], study: str, out: Path, command: list[str], at_once: int) -> None:
    """Trains packs on this machine; a signal ends their processes, too.

    Raises Interrupted.
    """
    heard = signals.LISTENER
    heard.interrupt()
    try:
        local.run(packs, study, out, command, at_once)
    except KeyboardInterrupt:
        raise Interrupted(heard.number, f"the cells that ended are in {out}") from None
    finally:
        heard.release()


def program() -> list[str]:
    """Returns the command line of this program."""
    return [sys.executable, str(Path(__file__).resolve())]


def dry_run(study: Study, out: Path, *, short: bool) -> None:
    """Prints the cells that a study needs, what is done of them, and the time of the rest."""
    lines = ledger.read(out)
    done, measured = ledger.done(lines), ledger.cell_seconds(lines)
    cells = progress.everything(study, done, short=short)
    missing = [cell for cell in cells if not ledger.find(done, cell)]
    table = Table(
        [*names("arm"), *numbers("seed", "learning rate", "seconds"), *names("state")],
        title=study.question,
    )
    for cell in cells:
        seconds = measured.get(cell.program, cell.seconds)
        word = "done" if ledger.find(done, cell) else "missing"
        table.add(cell.arm, str(cell.seed), f"{cell.rate:g}", f"{seconds:.0f}", word)
    shell.console().print(table)
    seconds = sum(expand.seconds_of(pack, measured) for pack in expand.packs(missing))
    shell.tell(
        f"{study.name}: {len(missing)} of {len(cells)} cells are missing, about "
        f"{seconds / 60:.0f} minutes of one core. Of an arm whose learning rate is searched, the "
        "seeds stand at the rate where the search begins; a search that goes on takes more."
    )


def listing() -> Table:
    table = Table([*names("study", "question", "paper")], title="studies")
    for name in studies.all_names():
        study = studies.load(name)
        table.add(name, study.question, study.paper)
    return table


def findings(folder: Path) -> str:
    """Returns docs/findings.md as the results in a folder make it."""
    return "\n\n".join(filter(None, (HEADING, results.summary(folder)))) + "\n"


def write_findings() -> None:
    FINDINGS.write_text(findings(RESULTS), encoding="utf-8")
    shell.tell(f"written: {FINDINGS}")


def main(argv: list[str]) -> int:
    return launch(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
