"""The engine of studies: cells, the ledger, the search of learning rates, verdicts, results."""

import dataclasses
import json
import math
import os
import signal
import sys

import jax
import pytest

from moe_jax import config, train
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.report.metrics import read_rows
from moe_jax.study import (
    begun,
    bracket,
    expand,
    judge,
    ledger,
    local,
    progress,
    results,
    slurm,
    statistics,
    train_cells,
)
from moe_jax.study.contract import ABOVE, BELOW, RATE, WITHIN, Claim, Study
from moe_jax.study.statistics import Difference, Speedup, StepRatio

TINY = {
    "model.d_model": 16,
    "model.num_kv_heads": 2,
    "model.repeats": 1,
    "model.ffn_hidden": 16,
    "model.moe.num_experts": 2,
    "model.moe.expert_hidden": 16,
    "data.sources": (("embedded:verse", 1.0),),
    "data.slice_bytes": 20_000,
    "data.heldout_bytes": 2_000,
    "data.seq_len": 32,
    "train.batch_size": 4,
    "train.steps": 4,
    "optim.warmup_steps": 1,
    "eval.final_batches": 1,
}
STUDY = Study(
    name="toy",
    question="Does a higher rate help?",
    paper="Nobody 2000, figure 1",
    equal="tokens",
    base=TINY,
    # They differ in nothing that is compiled.
    arms={"slow": {RATE: 1e-3}, "fast": {RATE: 3e-3}},
    claims=(Claim("faster is better", Difference("fast", "slow"), BELOW, 0.0, paper="-0.3 nats"),),
    measures=("prefix",),
    columns=("leak_bits",),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The ledger of a study of three seeds."""
    out = tmp_path_factory.mktemp("study")
    state = progress.look(STUDY, {})
    packs = expand.packs(state.missing)
    # Seeds and rates share a program.
    assert [len(pack) for pack in packs] == [6]
    for pack in packs:
        assert train_cells.run_pack(pack, STUDY.name, out) == 0
    return out


def done(out):
    return ledger.done(ledger.read(out))


def test_a_study_is_trained_once(trained):
    state = progress.look(STUDY, done(trained))
    assert not state.missing and sorted(state.runs) == [0, 1, 2]
    line = state.lines[0]
    assert {"commit", "machine", "data", "exit_code", "seconds", "key"} <= set(line)
    # The first cell of a pack compiles, the others do not.
    assert all(0 < each["cpu_seconds"] < state.lines[0]["cpu_seconds"] for each in state.lines[1:])
    figures = state.runs[0]["fast"]
    assert figures["tokens"] == 4 * 4 * 32 and 0 < figures["epochs"] < 1
    assert figures["memory"] > 4 * figures["total_parameters"]
    assert figures["total_parameters"] == figures["active_parameters"]
    assert abs(figures["leak_bits"]) < 1e-4
    # Another value of any key that matters is another cell, a key of logging is not.
    other = expand.cell(STUDY, "fast", 0, 3e-3)
    assert other.key in done(trained)
    assert expand.cell(STUDY, "fast", 0, 2e-3).key not in done(trained)
    logs = Study(**{**vars(STUDY), "base": {**TINY, "log.every": 3}})
    assert expand.cell(logs, "fast", 0, 3e-3).key == other.key


def test_a_cell_is_the_run_of_its_config(trained, tmp_path):
    """Seed and learning rate are arguments of a program: the losses are those of a training run."""
    cell = expand.cell(STUDY, "fast", 1, 3e-3)
    raw = json.loads(json.dumps(cell.raw))
    raw["log"]["every"] = 1
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        train.run(config.build(raw, 1), raw, tmp_path, 0.0)
    rows = list(read_rows(tmp_path / "metrics.jsonl"))
    figures = progress.look(STUDY, done(trained)).runs[1]["fast"]
    losses = [row["train/nll"] for row in rows if "train/nll" in row]
    assert [loss for _, loss in figures["curve"]] == pytest.approx(losses, rel=1e-6)
    held_out = [row["eval/bits_per_byte"] for row in rows if "eval/bits_per_byte" in row]
    assert figures["bits_per_byte"] == pytest.approx(held_out[-1], rel=1e-6)


def test_results_are_made_of_figures_alone(trained, tmp_path):
    folder = tmp_path / "toy"
    state = progress.look(STUDY, done(trained))
    results.write(folder, STUDY, state)
    table = (folder / "table.md").read_text()
    figures = json.loads((folder / "figures.json").read_text())
    assert table == results.render(figures, "")
    assert (
        "# Does a higher rate help?" in table and "| slow | 0.001 |" in table and "tokens" in table
    )
    assert "| faster is better | below 0 | -0.3 nats |" in table
    sizes = f"Models of {state.runs[0]['fast']['total_parameters']:,} parameters"
    assert sizes in table and "trained on 512 tokens" in table
    assert (folder / "plot.png").stat().st_size > 5000
    # What people wrote stays.
    (folder / "table.md").write_text(table + "\n## Notes\n\nIt is so.\n")
    results.write(folder, STUDY, state)
    assert (folder / "table.md").read_text() == table + "\n## Notes\n\nIt is so.\n"
    assert "Does a higher rate help?" in results.summary(tmp_path)


def test_the_search_counts_in_the_time_of_a_study():
    """Every run once; one of before processor time was measured counts with its seconds."""
    searches = Study(**{**vars(STUDY), "arms": {"a": {}}, "measures": ()})
    lines = {}
    for _ in range(3):
        for cell in progress.look(searches, lines).missing:
            facts = {"figures": {"bits_per_byte": abs(cell.rate - 4e-3)}, "seconds": 30.0}
            lines[cell.key] = {"key": cell.key, "cpu_seconds": 60.0, **facts}
    state = progress.look(searches, lines)
    assert len(state.searched) == 9 and len(state.lines) == 3 and not state.missing
    assert results.cpu_minutes([*state.lines, *state.searched, *state.lines]) == 12.0
    del state.lines[0]["cpu_seconds"]
    assert results.cpu_minutes([*state.lines, *state.searched]) == 11.5


def test_studies_that_measure_different_things_share_a_search():
    """A run that only tries a learning rate measures nothing further; all share a program."""
    searches = Study(**{**vars(STUDY), "arms": {"a": {}}})
    plain = Study(**{**vars(searches), "name": "plain", "measures": ()})
    (first, second), (tried, also_tried) = zip(
        *[
            (expand.cell(study, "a", 0, 4e-3), progress.look(study, {}).missing[1])
            for study in (searches, plain)
        ]
    )
    assert tried.measures == () and tried.key == also_tried.key
    assert first.measures == ("prefix",) and first.key != second.key
    assert first.program == second.program == tried.program


def test_an_arm_begins_from_an_upcycled_model():
    """At the learning rate 0 it stays what it begins as: the dense model, whose loss it has."""
    dense = {"model.period": ("dense",), RATE: 3e-3}
    begins = Study(**{**vars(STUDY), "arms": {"up": {}}, "parents": {"up": dense}, "measures": ()})
    cell = expand.cell(begins, "up", 0, 0.0)
    (again,) = expand.from_json(json.loads(json.dumps(expand.as_json([cell]))))
    assert again == cell
    fresh = Study(**{**vars(begins), "parents": {}})
    assert expand.cell(fresh, "up", 0, 0.0).key != cell.key
    # Other text than the dense model has seen.
    assert cell.parent.seed == expand.PARENT_SEED and cell.parent.rate == 3e-3
    program = train_cells.prepare(cell)
    figures, _ = train_cells.train(program, cell)
    of_parent = program.parents[cell.parent.program]
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        state = program.parents[cell.parent.key]
        loss = of_parent.evaluate(state, of_parent.cfg.eval.final_batches)["loss"]
        fresh_state = program.init(*train_cells.inputs(cell))
    assert state.step == 4 and figures["num_experts"] == 2
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    other = {**dense, "model.rope_theta": 500.0}
    cell = expand.cell(Study(**{**vars(begins), "parents": {"up": other}}), "up", 0, 0.0)
    with pytest.raises(UserError, match="the arm up is another model than its parent"):
        begun.upcycled(cell, fresh_state, state)


def test_a_cell_that_fails_stops_no_other(monkeypatch, tmp_path, capsys):
    cells = [expand.cell(STUDY, "fast", seed, 3e-3) for seed in (0, 1)]

    def fail_first(program, cell):
        if cell.seed == 0:
            raise ValueError("no luck")
        return {"loss": 1.0}, {"data": "x", "seconds": 1.0}

    monkeypatch.setattr(train_cells, "prepare", lambda cell: None)
    monkeypatch.setattr(train_cells, "train", fail_first)
    assert train_cells.run_pack(cells, "toy", tmp_path) == 70
    lines = ledger.read(tmp_path)
    assert [line["exit_code"] for line in lines] == [70, 0]
    assert lines[0]["reason"] == "ValueError: no luck" and list(done(tmp_path)) == [cells[1].key]
    assert list(ledger.failures(lines)) == [cells[0].key]


def test_a_new_key_loses_no_run():
    """A key with a default that the config did not have before; and a default that changed."""

    @dataclasses.dataclass(frozen=True)
    class Inner:
        width: int = 4

    @dataclasses.dataclass(frozen=True)
    class Old:
        depth: int
        inner: Inner = dataclasses.field(default_factory=Inner)

    @dataclasses.dataclass(frozen=True)
    class New(Old):
        cap: float = 0.0

    assert expand.changed(New(2)) == expand.changed(Old(2)) == {"depth": 2}
    assert expand.changed(New(2, Inner(8), 1.0)) == {"depth": 2, "inner": {"width": 8}, "cap": 1.0}

    cell = expand.cell(STUDY, "fast", 0, 3e-3)
    line = {"figures": {}, "config": cell.config}
    assert ledger.find({cell.key: line}, cell) is line
    # The version that trained it lacked a key.
    fewer = {key: value for key, value in cell.config["model"].items() if key != "logit_cap"}
    before = line | {"config": cell.config | {"model": fewer}}
    assert ledger.find({cell.key: before}, cell) is before
    # It had another value of one, as its default.
    other = cell.config | {"model": cell.config["model"] | {"logit_cap": 30.0}}
    assert ledger.find({cell.key: line | {"config": other}}, cell) is None
    # It had one that is no more.
    more = cell.config | {"model": cell.config["model"] | {"gone": 1}}
    assert ledger.find({cell.key: line | {"config": more}}, cell) is None


def test_a_process_that_is_killed_is_in_the_ledger(tmp_path):
    """One pack is killed, the other goes on; a torn line is no line."""
    packs = [[expand.cell(STUDY, arm, 0, 3e-3)] for arm in ("slow", "fast")]
    kill = f"import os, sys; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    script = f"import sys\nif sys.argv[1].endswith('.0.json'):\n    {kill}\n"
    local.run(packs, "toy", tmp_path, [sys.executable, "-c", script], 2)
    lines = ledger.read(tmp_path)
    assert [(line["arm"], line["exit_code"]) for line in lines] == [("slow", -signal.SIGKILL)]
    assert local.read_pack(tmp_path / "packs/toy.0.json") == ("toy", packs[0])
    with open(next((tmp_path / "ledger").glob("*.jsonl")), "a") as file:
        file.write('{"key": "torn", "exit_')
    assert len(ledger.read(tmp_path)) == 1


def test_slurm_gets_an_array_of_packs(tmp_path, monkeypatch):
    """A stand-in for sbatch runs the script of every place of the array."""
    tools = tmp_path / "bin"
    tools.mkdir()
    sbatch = tools / "sbatch"
    sbatch.write_text(
        "#!/bin/bash\nfor i in 0 1; do SLURM_ARRAY_TASK_ID=$i bash ${@: -1}; done\n"
        f'echo "$@" > {tmp_path}/said\necho Submitted batch job 7\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    packs = [[expand.cell(STUDY, arm, 0, 3e-3)] for arm in ("slow", "fast")]
    copy = ["cp", "-t", str(tmp_path)]
    said = slurm.submit(packs, "toy", tmp_path, copy, ["--partition=gpu"])
    assert said == "Submitted batch job 7"
    assert "--array=0-1" in (tmp_path / "said").read_text()
    assert "--partition=gpu" in (tmp_path / "said").read_text()
    assert local.read_pack(tmp_path / "1.json") == ("toy", packs[1])
    sbatch.write_text("#!/bin/bash\necho no such partition >&2\nexit 1\n")
    with pytest.raises(UserError, match="sbatch refuses: no such partition"):
        slurm.submit(packs, "toy", tmp_path, copy, [])


# The search of the learning rate


def searched(loss_of, limit=20):
    """(rates in the order in which they were tried, the last state) of a search."""
    study = Study(**{**vars(STUDY), "rate": 0.01, "factor": 2.0})
    figures, order = {}, []
    for _ in range(limit):
        state = bracket.search(study, figures)
        if not state.wanted:
            break
        for rate in state.wanted:
            order.append(rate)
            figures[rate] = loss_of(rate)
    return order, bracket.search(study, figures)


def test_a_search_ends_with_an_interior_optimum():
    order, state = searched(lambda rate: abs(math.log2(rate / 0.01)))
    assert sorted(order) == [0.005, 0.01, 0.02] and state.interior and state.best == 0.01
    order, state = searched(lambda rate: abs(math.log2(rate / 0.04)))
    assert state.best == 0.04 and state.interior and 0.08 in order
    # Above 0.02 it diverges.
    order, state = searched(lambda rate: math.inf if rate > 0.01 else 1 / rate)
    assert state.best == 0.01 and state.interior and len(order) == 3
    # All of the first three diverge.
    order, state = searched(lambda rate: math.inf if rate > 0.002 else 1 / rate)
    assert state.best == 0.00125 and state.interior


def test_a_search_that_ends_at_its_end_is_inconclusive():
    order, state = searched(lambda rate: -rate)
    assert state.best == max(order) == 0.16 and not state.interior and not state.wanted


# Verdicts


@pytest.mark.parametrize(
    ("holds", "bound", "values", "word"),
    [
        (BELOW, 0.0, [-1.0, -1.1, -0.9], judge.AGREES),
        (BELOW, 0.0, [1.0, 1.1, 0.9], judge.DISAGREES),
        (BELOW, 0.0, [-1.0, 1.0, 0.1], judge.TOO_SMALL),
        (ABOVE, 1.0, [1.2, 1.21, 1.22], judge.AGREES),
        (ABOVE, 1.0, [0.2, 0.21, 0.22], judge.DISAGREES),
        (WITHIN, 0.1, [0.01, 0.0, -0.01], judge.AGREES),
        (WITHIN, 0.1, [0.3, 0.31, 0.29], judge.DISAGREES),
        (WITHIN, 0.1, [0.1, 0.11, 0.09], judge.TOO_SMALL),
        (ABOVE, 0.0, [0.0, 0.0, 0.0], judge.TOO_SMALL),
        (BELOW, 0.0, [-1.0, -1.1], judge.INCONCLUSIVE),
        (BELOW, 0.0, [-1.0, -1.1, math.nan], judge.INCONCLUSIVE),
    ],
)
def test_the_rule_of_verdicts(holds, bound, values, word):
    claim = Claim("x", Difference("a", "b", "f"), holds, bound)
    study = Study(**{**vars(STUDY), "claims": (claim,)})
    runs = {seed: {"a": {"f": value}, "b": {"f": 0.0}} for seed, value in enumerate(values)}
    (verdict,) = judge.judge(study, runs, {})
    assert verdict.word == word
    # An arm without a learning rate leaves nothing to say.
    (verdict,) = judge.judge(study, runs, {"b": "the learning rate of b is not known"})
    assert verdict.word == judge.INCONCLUSIVE and "of b is not known" in verdict.why
    # A seed that one arm lacks is no pair.
    missing = {seed: {"a": found["a"]} for seed, found in runs.items()}
    assert judge.judge(study, missing, {})[0].interval.number == 0


def test_an_interval_is_about_that_of_student():
    # 1, 2, 4: mean 7/3, standard error sqrt(7/9), t(2 degrees of freedom, 97.5 %) = 4.302653.
    found = judge.interval([1.0, 2.0, 4.0])
    reach = 4.302653 * (7 / 9) ** 0.5
    assert found.mean == pytest.approx(7 / 3)
    assert found.high - found.mean == pytest.approx(reach, rel=0.1)


# Statistics, by hand


def test_the_step_ratio_by_hand():
    dense = {"curve": [[10, 3.0], [20, 2.0]]}
    # Between 3.0 at step 5 and 1.0 at step 15 the goal 2.0 is reached at step 10.
    runs = {"dense": dense, "moe": {"curve": [[5, 3.0], [15, 1.0], [20, 0.5]]}}
    assert StepRatio("moe", "dense")(runs) == pytest.approx(2.0)
    assert StepRatio("dense", "moe")(runs) == 1.0


def test_the_speedup_by_hand():
    """Dense: loss = x ** -0.5. Sparse: the loss that dense models have at four times the FLOPs."""
    runs = {f"d{x}": {"x": x, "loss": x**-0.5} for x in (1, 10, 100)}
    runs |= {f"s{x}": {"x": x, "loss": (4 * x) ** -0.5} for x in (1, 10)}
    speedup = Speedup(("s1", "s10"), ("d1", "d10", "d100"), "x", "loss")
    assert speedup(runs) == pytest.approx(4.0)
    # Dense models that are worse the larger they are: the verdict says so.
    rising = {arm: {"x": run["x"], "loss": 1 / run["loss"]} for arm, run in runs.items()}
    with pytest.raises(ValueError, match="do not improve with size"):
        speedup(rising)
    claim = Claim("x", speedup, ABOVE, 1.0)
    study = Study(**{**vars(STUDY), "claims": (claim,)})
    (verdict,) = judge.judge(study, {0: runs, 1: runs, 2: runs, 3: rising}, {})
    assert verdict.word == judge.INCONCLUSIVE and "a dense ladder does not fall" in verdict.why
    gaps = {"a": {"f": 5.0}, "b": {"f": 3.0}, "c": {"f": 2.0}, "d": {"f": 1.0}}
    assert statistics.Interaction("a", "b", "c", "d", "f")(gaps) == 1.0
    assert statistics.Slope(("a", "b"), (1.0, 2.0), "f")(gaps) == pytest.approx(-2.0)


def test_a_mistake_in_a_declaration_names_study_and_arm():
    wrong = Study(**{**vars(STUDY), "arms": {"odd": {"model.moe.no_such_key": 1}}})
    with pytest.raises(UserError, match=r"toy, arm odd: model\.moe\.no_such_key = 1: no key"):
        expand.cell(wrong, "odd", 0, 1e-3)
    wrong = Study(**{**vars(STUDY), "arms": {"odd": {"model.num_heads": 3}}})
    with pytest.raises(UserError, match=r"toy, arm odd: model\.num_heads"):
        expand.cell(wrong, "odd", 0, 1e-3)
