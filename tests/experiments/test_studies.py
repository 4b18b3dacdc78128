"""The declarations of experiments/studies/, and what was made of their results."""

import ast
import json
import math

import pytest

from experiments import run, studies, writing
from moe_jax.study import expand, ledger, local, progress, results, train_cells

NAMES = studies.all_names()
# Minutes of two cores that a study may take, as it expects itself.
MOST_MINUTES = 120


@pytest.mark.parametrize("name", NAMES)
def test_a_declaration_is_short_and_builds(name):
    text = (studies.FOLDER / f"{name}.py").read_text()
    tree = ast.parse(text)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    first = imports[-1].end_lineno
    declared = [line for line in text.splitlines()[first:] if line.strip()]
    assert len(declared) <= 40, f"{name}: {len(declared)} lines of declaration"
    study = studies.load(name)
    assert study.name == name and len(study.seeds) >= 3
    known = set(study.arms)
    assert all(set(claim.statistic.arms) <= known for claim in study.claims) and study.claims
    assert set(study.x) <= known
    assert "arXiv:" in study.paper
    cells = progress.everything(study, {})
    keys = [cell.key for cell in cells]
    assert len(set(keys)) == len(keys)
    minutes = sum(expand.seconds_of(pack, {}) for pack in expand.packs(cells)) / 60
    assert minutes / 2 <= MOST_MINUTES, f"{name}: {minutes:.0f} minutes of one core"
    # Seeds that are compared have not chosen the learning rate.
    assert not set(study.tuning_seeds) & set(study.seeds)


def test_the_pages_are_those_of_the_results():
    assert run.FINDINGS.read_text() == run.findings(run.RESULTS), (
        "stale: python -m experiments.run NAME --report"
    )
    for path in run.RESULTS.glob("*/figures.json"):
        figures = json.loads(path.read_text())
        if "verdicts" not in figures:
            continue
        table = path.parent / "table.md"
        made = results.render(figures, results.notes(table))
        assert table.read_text() == made, f"{table} is stale"
        study = studies.load(figures["name"])
        same = (study.question, study.paper, study.equal, list(study.arms))
        found = (figures["question"], figures["paper"], figures["equal"], list(figures["arms"]))
        assert found == same, f"{path} is of another declaration"
        assert [each["claim"] for each in figures["verdicts"]] == [c.says for c in study.claims]


def test_a_dry_run_tells_cells_and_time(tmp_path, capsys):
    assert run.main(["loss_free_bias", "--dry_run", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "42 of 42 cells are missing" in said and "minutes of one core" in said
    assert not list(tmp_path.iterdir())


def test_a_report_of_no_runs_writes_over_nothing(tmp_path, capsys):
    results = tmp_path / "results"
    flags = ["--report", "--out", str(tmp_path / "elsewhere"), "--results", str(results)]
    assert run.main(["hash_floor", *flags]) == 64
    assert "--report: no run of hash_floor is in the ledger" in capsys.readouterr().err
    assert not results.exists()


DECLARATION = """
from experiments.studies import small
from moe_jax.study.contract import BELOW, Claim, Study
from moe_jax.study.statistics import Difference

STUDY = Study(
    name="mine",
    question="?",
    paper="Nobody 2000, figure 1",
    equal="tokens",
    base=small(),
    arms={"a": {}, "b": {"model.moe.num_experts": 4}},
    claims=(Claim("b is better", Difference("b", "a"), BELOW, 0.0),),
)
"""


def test_a_process_trains_an_arm_to_its_end(tmp_path, monkeypatch):
    """The search goes on beyond its first rates, then the seeds follow: one program, one process.

    The best rate of arm a is 0.016, two steps above where the search begins.
    """
    path = tmp_path / "mine.py"
    path.write_text(DECLARATION)
    study = studies.load(str(path))
    pack = [cell for cell in progress.look(study, {}).missing if cell.arm == "a"]
    local.write_pack(tmp_path / "pack.json", study.name, pack)
    trained, prepared = [], []

    def train(program, cell):
        trained.append((cell.arm, cell.seed, cell.rate))
        loss = abs(math.log2(cell.rate / 0.016))
        return {"loss": loss, "bits_per_byte": loss}, {"data": "x", "seconds": 1.0}

    monkeypatch.setattr(train_cells, "prepare", prepared.append)
    monkeypatch.setattr(train_cells, "train", train)
    monkeypatch.setattr(writing, "compile_quickly", lambda folder: None)
    out = tmp_path / "out"
    words = [str(path), "--out", str(out), "--work", str(tmp_path / "pack.json")]
    assert run.main(words) == 0
    rates = [rate for _, seed, rate in trained if seed == 1000]
    assert rates == [0.002, 0.004, 0.008, 0.016, 0.032]
    searched = len(rates) * len(study.tuning_seeds)
    assert {seed for _, seed, _ in trained[:searched]} == set(study.tuning_seeds)
    assert trained[searched:] == [("a", seed, 0.016) for seed in study.seeds]
    assert len(prepared) == 1
    # What is left is the other arm.
    state = progress.look(study, ledger.done(ledger.read(out)))
    assert {cell.arm for cell in state.missing} == {"b"} and not state.arms["a"].undecided


def test_the_surplus_of_relu_stands_on_its_own_arm():
    """A router that fixes its number of experts leaves no figure "active" to be compared with."""
    study = studies.load("relu_routing")
    cell = expand.cell(study, "top_k", 0, 0.01)
    assert progress.with_derived(study, cell, {"granularity": 2})["surplus"] == 0
    cell = expand.cell(study, "relu", 0, 0.01)
    found = progress.with_derived(study, cell, {"granularity": 2, "active": 1.75})
    assert study.claims[1].statistic({"relu": found}) == -0.25


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("loss_free_bais",), "no study is called 'loss_free_bais': did you mean loss_free_bias?"),
        (("epochs", "--local", "0"), "--local 0 must be at least 1"),
        (("epochs", "--out", "/dev/null/x"), "--out /dev/null/x cannot be made or written to"),
    ],
)
def test_a_mistake_is_one_line(flags, message, capsys):
    assert run.main(list(flags)) == 64
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ")


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_every_arm_of_a_study_trains(name, tmp_path):
    assert run.main([name, "--smoke", "--out", str(tmp_path)]) == 0
    done = ledger.done(ledger.read(tmp_path / ".smoke"))
    assert len({line["arm"] for line in done.values()}) == len(studies.load(name).arms)
