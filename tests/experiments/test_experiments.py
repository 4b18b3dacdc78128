"""The runner of experiments: what is finished is not run again, what was interrupted goes on, runs
of a seed are compared, by hand.
"""

import json
import math
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import command_line, routers, run, sparse_inputs
from experiments import sparse_training_rules as rules
from moe_jax import config, train
from moe_jax.config import command_line as config_flags
from moe_jax.errors import UserError
from moe_jax.plan import flops
from moe_jax.report.metrics import read_rows

BASE = {
    "model.d_model": 16,
    "model.num_kv_heads": 2,
    "model.repeats": 1,
    "model.moe.num_experts": 2,
    "model.moe.expert_hidden": 16,
    "data.sources": (("embedded:verse", 1.0),),
    "data.slice_bytes": 20_000,
    "data.heldout_bytes": 2_000,
    "data.seq_len": 32,
    "train.batch_size": 4,
    "train.steps": 2,
    "optim.warmup_steps": 1,
    "eval.final_batches": 1,
    "log.every": 1,
    "checkpoint.every": 1,
}
CELLS = {"wide": {}, "sparse": {"model.moe.sparse.rule": "static"}}
GRID = run.Grid(run.ROOT / "configs/base.py", BASE, CELLS, (0, 1))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    return out, run.run_all(GRID, out)


def test_a_grid_is_run_once_and_resumes(results, monkeypatch):
    out, first = results
    assert {cell: sorted(runs) for cell, runs in first.items()} == {
        "wide": [0, 1],
        "sparse": [0, 1],
    }
    assert all(0 < found["epochs"] < 1 for runs in first.values() for found in runs.values())
    assert first["wide"][0]["density"] == 1 and first["sparse"][0]["density"] == 0.25
    # an interruption after the first step of one run: its checkpoint is there, its result is not
    again = run.place(out, "sparse", 1)
    (again / "result.json").unlink()
    for path in (again / "checkpoints").glob("step_*2"):
        path.rename(out / "lost")
    started = []
    original = train.run
    monkeypatch.setattr(train, "run", lambda *given: started.append(given[2]) or original(*given))
    second = run.run_all(GRID, out)
    assert started == [again]

    def drop(runs):
        return {
            c: {s: {k: v for k, v in f.items() if k != "seconds"} for s, f in r.items()}
            for c, r in runs.items()
        }

    assert drop(second) == drop(first)
    assert len(json.loads((again / "run.json").read_text())) == 2


def test_runs_of_a_seed_are_paired(results):
    out, found = results

    def tokens(cell, seed):
        return [
            row["train/tokens"]
            for row in read_rows(run.place(out, cell, seed) / "metrics.jsonl")
            if "train/tokens" in row
        ]

    for seed in (0, 1):
        assert tokens("wide", seed) == tokens("sparse", seed)
    gap = run.paired(found, "sparse", "wide", "loss")
    by_hand = [found["sparse"][seed]["loss"] - found["wide"][seed]["loss"] for seed in (0, 1)]
    assert gap.mean == pytest.approx(sum(by_hand) / 2) and gap.number == 2
    # t(1 degree of freedom) = tan(0.475 pi) = 12.706; the standard error of two values is half
    # their distance
    assert gap.half == pytest.approx(math.tan(0.475 * math.pi) * abs(by_hand[0] - by_hand[1]) / 2)
    assert "| sparse |" in run.compare(found, "loss").markdown()


def test_another_config_is_no_result_of_this_one(results):
    out, _ = results
    other = GRID._replace(base={**BASE, "optim.learning_rate": 1.0})
    with pytest.raises(
        UserError, match=r"result\.json is the result of another config .*optim\.learning_rate"
    ):
        run.run_all(other, out)
    with pytest.raises(UserError, match=r"cell odd: model\.moe\.no_such_key = 1: no key is called"):
        run.run_all(GRID._replace(cells={"odd": {"model.moe.no_such_key": 1}}), out)


def test_an_interval_by_hand():
    # 1, 2, 4: mean 7/3, variance ((4/3)^2 + (1/3)^2 + (5/3)^2) / 2 = 7/3; t(2 degrees of freedom,
    # 97.5 %) = 4.302653
    found = run.interval([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.302653 * (7 / 3 / 3) ** 0.5, rel=1e-6)
    assert not found.decided and run.interval([1.0, 1.01, 1.02]).decided
    assert run.interval([3.0]).half == math.inf


def test_results_keep_the_verdict_that_people_wrote(tmp_path):
    def draw(figure):
        return figure.subplots().plot([0, 1])

    run.write(tmp_path, "T", ["| a |"], {"a": 1}, draw, (2, 2))
    path = tmp_path / "table.md"
    path.write_text(path.read_text().replace("Not written yet.", "It is so."))
    run.write(tmp_path, "T", ["| b |"], {"b": 1}, draw, (2, 2))
    assert path.read_text() == "# T\n\n| b |\n\n## Verdict\n\nIt is so.\n"
    assert (
        json.loads((tmp_path / "figures.json").read_text()) == {"b": 1}
        and (tmp_path / "plot.png").stat().st_size > 1000
    )


def test_training_flops_count_what_is_not_zero():
    cfg = rules.built(rules.sparse("static", 0.25))
    tokens = cfg.train.batch_size * cfg.data.seq_len
    dense = flops.train_per_token(cfg.model, cfg.data.seq_len) * tokens
    assert rules.training_flops(cfg, [(5, 1.0), (10, 1.0)]) == pytest.approx(10 * dense)
    experts = flops.forward_per_token(cfg.model, cfg.data.seq_len).experts
    assert rules.training_flops(cfg, [(10, 0.25)]) == pytest.approx(
        10 * (dense - 3 * 0.75 * experts * tokens)
    )
    # threshold: the gradient of weights is dense, the other two products are not
    cfg = rules.built(rules.sparse("threshold", 0.25))
    assert rules.training_flops(cfg, [(10, 0.25)]) == pytest.approx(
        10 * (dense - 2 * 0.75 * experts * tokens)
    )
    # static and narrow of as many weights take as many
    narrow = rules.built(rules.narrow(0.25))
    assert flops.train_per_token(narrow.model, 128) * tokens == pytest.approx(
        dense - 3 * 0.75 * experts * tokens
    )


def test_magnitude_at_equal_flops():
    density = [d for _, d in rules.magnitude_curve(100, 0.25)]
    assert density[: rules.EVERY] == [1] * rules.EVERY and density[-50:] == [0.25] * 50
    assert all(a >= b for a, b in pairwise(density))
    assert density[rules.EVERY] == pytest.approx(0.25 + 0.75 * (1 - rules.EVERY / 50) ** 3)
    steps = rules.magnitude_steps(0.25)
    budget = rules.training_flops(rules.built(rules.narrow(0.25)), [(rules.STEPS, 1.0)])
    used = rules.training_flops(
        rules.built(rules.sparse("magnitude", 0.25, steps)), rules.magnitude_curve(steps, 0.25)
    )
    assert 0.99 * budget < used <= budget


def test_the_grids_are_within_their_limits_and_configs():
    from experiments import sparsity_vs_quality as quality

    for cells in (rules.CELLS, quality.CELLS):
        assert len(cells) * len(rules.SEEDS) <= 24
        for cell in cells:
            config.build(run.read_config(rules.grid(cells), cell, 0), 1)
    assert set(rules.OTHERS) <= set(quality.CELLS) and set(quality.READ) <= set(rules.CELLS)
    assert all(quality.CELLS[name] == rules.OTHERS[name] for name in rules.OTHERS)
    rivals = [
        rules.built(cells).model
        for cells in (rules.OTHERS["narrow_1_4"], rules.CELLS["static_1_4"])
    ]
    assert flops.parameters(rivals[0]).experts == 0.25 * flops.parameters(rivals[1]).experts


def test_all_ways_of_sparse_inputs_are_one():
    vocabulary = 50
    bags, table, target = (
        sparse_inputs.draw_bags(vocabulary, 0),
        sparse_inputs.first_table(vocabulary),
        sparse_inputs.first_target(),
    )
    assert len(bags.item_N) > vocabulary  # items come twice, also in a row
    want = sparse_inputs.multi_hot(bags, vocabulary) @ np.asarray(table)
    for way, forward in sparse_inputs.FORWARD.items():
        np.testing.assert_allclose(
            forward(table, *sparse_inputs.rows_of(way, bags, vocabulary)),
            want,
            rtol=1e-4,
            atol=1e-4,
        )
    tables = []
    for name, (way, function, donates) in sparse_inputs.PROGRAMS.items():
        value, result = jax.jit(function)(
            table, target, *sparse_inputs.rows_of(way, bags, vocabulary)
        )
        assert value == pytest.approx(
            np.square(want - np.asarray(target)).sum() / sparse_inputs.ROWS, rel=1e-4
        )
        tables.append(result if donates else table - sparse_inputs.RATE * result)
        assert sparse_inputs.compiled(name, bags, vocabulary)[1] > table.nbytes
    for other in tables[1:]:
        np.testing.assert_allclose(other, tables[0], rtol=1e-4, atol=1e-4)


def typed(*words, cwd=run.ROOT):
    """(exit code, standard error) of an experiment that is typed as a script."""
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(("name", "flags"), [("routers", ()), ("sparse_savings", ("models",))])
def test_an_experiment_may_be_typed_as_a_script(name, flags, tmp_path):
    """From any directory; what is wrong with its flags is one line, and nothing is made."""
    code, said = typed(run.ROOT / f"experiments/{name}.py", *flags, "--no_such_flag", cwd=tmp_path)
    assert (
        (code, said.count("\n")) == (64, 1)
        and said.startswith("error: ")
        and "--no_such_flag" in said
    )
    assert not list(tmp_path.iterdir())


def test_every_experiment_finds_its_modules_and_hears_signals_as_a_script():
    beginning = re.compile(
        r'if __name__ == "__main__":.*\n    sys\.path\.insert.*\n(.*\n)*?    '
        r"command_line\.hear_signals\(\)"
    )
    for path in (run.ROOT / "experiments").glob("*.py"):
        text = path.read_text()
        assert "def main(" not in text or beginning.search(
            text[: text.index("import jax") if "import jax" in text else None]
        )


HERE = ("--config", str(run.ROOT / "configs/base.py"))


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        (run, ("--out", "o", "--cell", "a:"), "the following arguments are required: --config"),
        (
            run,
            (*HERE, "--out", "o", "--cell", "a:", "--seeds", "2,x"),
            "--seeds: 'x' is no seed: write numbers, as in",
        ),
        (
            run,
            (*HERE, "--out", "o", "--cell", "a:", "--seeds", "1", "1"),
            "--seeds 1 1: a seed is given twice",
        ),
        (
            run,
            (*HERE, "--out", "o", "--cell", "a:", "--num_seeds", "0"),
            "--num_seeds 0 must be at least 1",
        ),
        (run, (*HERE, "--out", "o", "--cell", "a:", "--cell", "a:"), "two cells are called a"),
        (run, (*HERE, "--out", "o", "--cell", "../a:"), "NAME is that of a directory"),
        (
            run,
            (*HERE, "--out", "o", "--cell", "a: --config.model.num_heads=3"),
            "cell a: model.num_heads (3) must be",
        ),
        (
            run,
            (*HERE, "--out", "file/o", "--cell", "a:"),
            "--out file/o cannot be made or written to (Not a directory)",
        ),
        (
            routers,
            ("--out", "o", "top_q"),
            "'top_q' is no router of this experiment: choose from top_k, switch",
        ),
        (sparse_inputs, ("--peak", "bag"), "argument --peak: invalid choice"),
        (
            rules,
            ("--out", "o", "--report"),
            "--out o has no finished run of this experiment: train first",
        ),
    ],
)
def test_a_mistake_in_an_experiment_is_one_line(
    tmp_path, monkeypatch, capsys, program, flags, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert program.main(list(flags)) == 64
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "o" / "a").exists()


@pytest.mark.parametrize(
    ("flags", "want", "told"),
    [
        ((), (0, 1, 2), "seeds 0, 1, 2"),
        (("--seeds", "0", "5"), (0, 5), "seeds 0, 5"),
        (("--seeds", "0,5"), (0, 5), "seeds 0, 5"),
        (("--seeds", "2"), (2,), "seed 2 alone (--num_seeds 2 takes 2 seeds)"),
        (("--num_seeds", "2"), (0, 1), "seeds 0, 1"),
        (("--num_seeds", "1"), (0,), "seed 0 alone"),
    ],
)
def test_seeds_are_named_or_counted(flags, want, told):
    found = command_line.seeds(run.parse([*HERE, "--out", "o", "--cell", "a:", *flags]))
    assert found == want and command_line.seeds_told(found) == told


def test_an_interrupted_run_ends_the_experiment_with_its_signal(monkeypatch, capsys, tmp_path):
    def told_to_end(*given):
        raise run.Interrupted(2, "saved step 3 of 9 in x")

    monkeypatch.setattr(run, "run_one", told_to_end)
    assert run.main([*HERE, "--out", str(tmp_path), "--cell", "a:"]) == 130
    assert (
        capsys.readouterr().err == "saved step 3 of 9 in x; the same command goes on from there\n"
    )


def test_ctrl_c_while_an_experiment_begins_is_one_line():
    words = [sys.executable, "experiments/sparse_inputs.py", "--smoke"]
    process = subprocess.Popen(
        words, cwd=run.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def listens():
        return (
            int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & 1 << signal.SIGHUP - 1
        )

    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None and not listens():  # Python itself catches SIGINT, but no SIGHUP
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said and said.count("\n") == 1, said


def test_a_smoke_of_a_grid_takes_the_first_seed_and_a_place_of_its_own(tmp_path, capsys):
    changes = {
        key: value for key, value in BASE.items() if key not in ("train.steps", "checkpoint.every")
    }
    flags = [
        *HERE,
        "--out",
        str(tmp_path),
        "--smoke",
        "--cell",
        "a:",
        *config_flags.words_of(changes),
    ]
    cache = jax.config.jax_compilation_cache_dir
    try:
        assert run.main(flags) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    said = capsys.readouterr().out
    assert "1 cell, seed 0 alone: 1 run in" in said and "| a |" in said
    assert [path.name for path in tmp_path.iterdir()] == [".smoke"]
