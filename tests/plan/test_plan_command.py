"""`python -m moe_jax plan`: what it compiles, what it says, and with which code it ends."""

import json
from pathlib import Path

import card_cases
import jax
import pytest

from moe_jax import __main__, config
from moe_jax.config import command_line, config_file
from moe_jax.parallel import mesh
from moe_jax.plan import card, chips, search

DEBUG = ("--config", "debug", "--topology", "cpu:8")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def not_compiled(monkeypatch):
    """Every step takes 10 MB, and nothing is compiled."""

    def compiled(cfg, rounds):
        return card_cases.compiled(4_000_000, 3_000_000, 3_000_000, 6_000_000)

    monkeypatch.setattr(card, "_compiled", compiled)


@pytest.fixture
def known_chip(monkeypatch):
    """Returns a function that gives CPUs a data sheet with so much memory."""

    def know(memory):
        chip = chips.CHIPS["h100"]._replace(memory=memory)
        monkeypatch.setattr(chips, "of_kind", lambda kind: chip)

    return know


@pytest.fixture
def few(monkeypatch):
    """Two meshes of eight."""
    some = [mesh.Lengths(data=8), mesh.Lengths(data=4, expert=2)]
    monkeypatch.setattr(mesh, "all_of", lambda number, stage, seq: some)


def plan(*words):
    return __main__.main(["plan", *words])


def test_the_real_step_is_compiled_and_its_figures_are_written(capsys, tmp_path):
    out = tmp_path / "plans" / "debug.json"
    small = ("--config.model.repeats=1", "--config.model.prefix=()")
    small += ("--config.train.micro_batch_size=0", "--config.optim.ema_decay=0.0")
    assert plan(*DEBUG, "--out", str(out), *small) == 0
    said = capsys.readouterr().out
    for words in (
        "8 x cpu (data 2 x expert 2 x model 2)",
        "routed experts",
        "all-gather",
        "tokens",
    ):
        assert words in said
    (found,) = json.loads(out.read_text())["plans"]
    assert found["mesh"] == "2x2x2" and found["fits"] is None and found["estimate"] is None
    work = {one["part"]: one for one in found["work"]}
    # A block that is rematerialised: four passes instead of three.
    projections = work["attention projections"]
    assert projections["done"] == pytest.approx(4 / 3 * projections["useful"], rel=0.02)
    head = work["head"]
    assert head["done"] == pytest.approx(head["useful"], rel=0.01)
    # Nothing is counted that nobody knows.
    assert work.get("other", {"done": 0})["done"] < 0.02 * sum(one["done"] for one in work.values())
    assert found["peak_logged"] == found["compiled"]["peak"] + found["memory"]["parameters"]


def test_what_does_not_fit_ends_with_one(not_compiled, known_chip, capsys):
    known_chip(20_000_000)
    assert plan(*DEBUG) == 0 and "fits" in capsys.readouterr().out
    known_chip(9_000_000)
    assert plan(*DEBUG) == 1 and "DOES NOT FIT" in capsys.readouterr().out
    # The copy of the parameters before a logged step counts.
    known_chip(10_000_000)
    assert plan(*DEBUG) == 1


HBM = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(116.59G) exceeds available HBM (95.74G).\nLargest program allocations: ..."
)


def test_a_step_that_the_compiler_refuses_is_told_in_a_line(
    few, monkeypatch, known_chip, capsys, tmp_path
):
    """libtpu stops at such a step, and has no card of it: the other meshes are planned."""
    known_chip(10**12)

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError(HBM)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    out = tmp_path / "plans.json"
    assert plan(*DEBUG, "--mesh", "8x1x1", "--mesh", "1x8x1", "--out", str(out)) == 1
    found = json.loads(out.read_text())
    assert found["plans"] == [] and len(found["refused"]) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if "error: " in line]
    assert [line.partition(":")[0] for line in errors] == ["error", "error"]
    for words in ("mesh 8x1x1: this does not fit", "(116.59G)", "train.micro_batch_size"):
        assert words in errors[0]
    assert "Traceback" not in said and "mesh 1x8x1" in errors[1]
    # A search names each such candidate, and has none that fits.
    assert plan(*DEBUG, "--search", "--best", "2") == 1
    assert capsys.readouterr().err.count("this does not fit into the memory of a device") == 2


def test_several_meshes_are_planned_one_after_another(not_compiled, capsys):
    assert plan(*DEBUG, "--mesh", "8x1x1", "--mesh=1x8x1") == 0
    said = capsys.readouterr().out
    assert "(data 8)" in said and "(expert 8)" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*DEBUG, "--mesh", "2x2"), "--mesh 2x2: write DATAxEXPERTxMODEL"),
        ((*DEBUG, "--mesh", "3x1x1"), "does not make 8 devices: change the lengths (the nearest"),
        ((*DEBUG, "--search", "--mesh", "8x1x1"), "--search chooses the mesh"),
        (("--config", "debug", "--topology", "v9:4x4"), "--topology v9:4x4: write cpu:N"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    assert plan(*words) == 64
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_search_ranks_what_fits_and_compiles_the_best(few, not_compiled, known_chip, capsys):
    known_chip(10**12)
    assert plan(*DEBUG, "--search", "--best", "2") == 0
    said = capsys.readouterr().out
    estimated, _, compiled = said.partition("\ncompiled ")
    # Without rematerialisation nothing is computed twice.
    assert estimated.count("remat") >= 8 and "remat none" in estimated
    assert compiled.count("remat") == 2 and "tokens/s" in compiled


def test_a_search_tries_one_of_two_buffers_that_hold_the_same_rows(few):
    """On a data axis the worst case is a device's own assignments and the padding of its experts:
    less than 1.25 times the balanced load, but for a few tokens.
    """

    def tried(seq_len):
        raw = command_line.read(Path("debug"), [f"--config.data.seq_len={seq_len}"])
        ranked = search.rank(raw, "cpu:8", jax.devices())
        return {(str(one.mesh), one.dispatcher) for one in ranked}

    assert ("8x1x1", "dropless 1.25") in tried(32)
    many = tried(512)
    assert ("8x1x1", "dropless 0") in many and ("8x1x1", "dropless 1.25") not in many
    assert {("4x2x1", "dropless 0"), ("4x2x1", "dropless 1.25")} <= many


def test_a_search_says_what_is_least_where_nothing_fits(few, not_compiled, known_chip, capsys):
    known_chip(1000)
    assert plan(*DEBUG, "--search") == 64
    assert "nothing fits into cpu:8: the least is" in capsys.readouterr().err


def test_a_dry_run_has_the_same_card(not_compiled, known_chip, monkeypatch):
    """The banner's flags and the card come from the devices of the mesh that is set."""
    known_chip(20_000_000)
    cfg = config.build(config_file.read(Path("debug")), 8)
    with jax.set_mesh(mesh.make(cfg.mesh)):
        found = card.card(cfg)
    assert found.fits and found.estimate.step >= 0 and found.chip.name == "h100"
