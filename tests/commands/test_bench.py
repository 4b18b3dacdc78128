"""The command `bench`: every variant runs in a process of its own, is timed beside the first, and
is told with its parameters; rivals are models of the same shapes.
"""

import contextlib
import io
import json
import math
import re
import statistics
from pathlib import Path

import pytest

from moe_jax import __main__, config
from moe_jax.bench import overheads, results, rivals, scaling, session, workers
from moe_jax.bench.contract import Job, Timing
from moe_jax.commands import bench
from moe_jax.config import command_line, config_file
from moe_jax.errors import UserError
from moe_jax.terminal.working import silent

SMALL = [
    f"--config.{change}"
    for change in (
        "model.vocab_size=64",
        "model.d_model=16",
        "model.num_heads=2",
        "model.num_kv_heads=2",
        "model.repeats=1",
        "model.moe.expert_hidden=8",
        "model.ffn_hidden=16",
        "data.seq_len=8",
        "train.batch_size=8",
    )
]


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """(the output, the JSON) of one bench of everything that is quick, rivals too."""
    return _bench(tmp_path_factory.mktemp("bench") / "now.json")


def _bench(out: Path):
    flags = ["--config", "bench:e8", "--rounds", "2", "--rivals", "--out", str(out), *SMALL]
    variants = ["--variant", "e8:", "--variant", "dense: --config.model.period='(\"dense\",)'"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert __main__.main(["bench", "--what", "train", *flags, *variants]) == 0
    return said.getvalue(), json.loads(out.read_text())


def test_variants_are_timed_beside_the_first_and_beside_their_rivals(timed):
    said, parts = timed
    rows = {row["name"]: row for row in parts["training"]}
    assert list(rows) == ["e8", "dense"]
    for row in rows.values():
        ours, theirs = row["timing"], row["rival"]
        assert len(ours["seconds"]) == len(theirs["seconds"]) == 2
        # The shapes are those of ours: parameters but for norms, and first losses of ln 64.
        assert ours["facts"]["total"] == pytest.approx(theirs["facts"]["total"], rel=1e-3)
        assert ours["facts"]["loss"] == pytest.approx(theirs["facts"]["loss"], abs=0.3)
    ratio = statistics.median(
        dense / e8
        for dense, e8 in zip(
            rows["dense"]["timing"]["seconds"], rows["e8"]["timing"]["seconds"], strict=True
        )
    )
    # A table that is too wide for the terminal is several.
    lines = [line.split() for line in said.splitlines() if line.startswith("dense ")]
    assert any(f"{ratio:.2f}" in cells for cells in lines)
    assert set(parts["peak"]) == {"jax, float32", "torch, float32"}
    assert parts["machine"]["jax"] and parts["machine"]["cores"] >= 1


def test_results_are_compared_with_earlier_ones(timed):
    _, parts = timed
    slower = json.loads(json.dumps(parts))
    row = slower["training"][0]
    row["timing"]["seconds"] = [2 * seconds for seconds in row["timing"]["seconds"]]
    table = results.against(slower, parts, "before.json")
    ratios = {row.cells[0]: row.cells[3] for row in table.rows}
    assert ratios["training, e8"] == "2.00"
    assert ratios["training, dense"] == ratios["matrix product, jax, float32"] == "1.00"


@pytest.mark.full
def test_decoding_layer_and_compilation_are_jobs(tmp_path):
    changes = tuple(SMALL)
    narrow = (*changes, "--config.model.dtype=bfloat16")
    options = {"batch": 2, "prompt": 4, "new": 20}
    jobs = [
        Job("ours", "decode", "bench:e8", changes, options),
        Job("theirs", "rival_decode", "bench:e8", changes, {**options, "experts": "eager"}),
        Job("narrow", "rival_train", "bench:e8", narrow, {"experts": "eager"}),
        Job("product", "product", options={"dtype": "bfloat16"}),
        Job("their product", "rival_product", options={"dtype": "bfloat16"}),
        Job("layer", "layer", "bench:e8", changes, {"collapsed": True}),
        Job("compiled", "compilation", "bench", changes, {"cache": str(tmp_path)}),
    ]
    timings = workers.interleave(jobs, 1, silent)
    assert timings["ours"].facts == timings["theirs"].facts == {"tokens": 40}
    # An untrained model guesses one of 64 symbols, in bfloat16 too.
    assert timings["narrow"].facts["loss"] == pytest.approx(math.log(64), abs=0.3)
    assert timings["layer"].facts["tokens"] == 64
    assert timings["compiled"].facts["compile"] > 0
    assert all(timing.memory > 1e7 for timing in timings.values())


@pytest.mark.full
def test_sizes_are_timed_beside_the_variant_as_it_is(tmp_path, monkeypatch):
    """Step times against experts and tokens, as tables, as JSON and as a picture."""
    monkeypatch.setattr(scaling, "EXPERTS", (16,))
    monkeypatch.setattr(scaling, "TOKENS", (128,))
    out, plot = tmp_path / "now.json", tmp_path / "scaling.png"
    flags = [
        "--config",
        "bench:e8",
        "--rounds",
        "1",
        *SMALL,
        "--out",
        str(out),
        "--plot",
        str(plot),
    ]
    assert bench.main(["--what", "scaling", *flags]) == 0
    experts, tokens = json.loads(out.read_text())["scaling"]
    assert experts["size"] == "experts"
    more, base = (timing["facts"] for timing in experts["timings"]["16"])
    # Three matrices of 8 x 16 for each expert, and a column of the router.
    assert more["total"] - base["total"] == 8 * (3 * 8 * 16 + 16)
    assert [timing["facts"]["tokens"] for timing in tokens["timings"]["128"]] == [128, 64]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_a_run_tells_what_it_spent_beside_its_steps():
    # A run reads text, as bytes.
    changes = (*SMALL, *overheads.OFF, "--config.model.vocab_size=256", "--config.train.steps=3")
    # A row of two steps, and one of four.
    rows = [[*changes, f"--config.train.steps={steps}"] for steps in (2, 4)]
    job = Job("run", "run", "bench:e8", changes, {"rows": rows})
    timing = workers.interleave([job], 3, silent)["run"]
    assert len(timing.seconds) == 3 and all(0 < seconds < 60 for seconds in timing.seconds)
    # A run says so by these names; a name that it does not use would count as 0 seconds.
    assert timing.facts["stepped"] > 0
    assert timing.facts["waited"] > 0


def test_a_ratio_is_taken_round_by_round():
    """A machine that is three times slower in one round does not change it."""
    slow = Timing({}, (1.0, 3.0, 1.0), 0)
    fast = Timing({}, (0.5, 1.5, 0.5), 0)
    assert results.ratio(slow, fast) == 2.0


def test_the_variants_of_a_file_are_timed_where_none_is_named():
    assert config_file.variants(Path("bench"))[:2] == ("dense", "e8")
    assert config_file.variants(Path("bench:e8")) == ()
    args = bench.parse(["--config", "bench", "--config.train.batch_size=2"])
    variants = bench.read_variants(args)
    assert list(variants) == list(config_file.variants(Path("bench")))
    job, cfg = variants["e64_capacity"]
    assert cfg.model.moe.num_experts == 64
    assert cfg.train.batch_size == 2
    assert job.config == "bench:e64_capacity"


@pytest.mark.parametrize("dtype", rivals.DTYPES)
def test_the_rival_multiplies_in_the_dtype_of_the_variant(dtype):
    import torch

    x = torch.ones(2, 2)
    with rivals.products_in(dtype):
        assert (x @ x).dtype == getattr(torch, dtype)


def test_variants_of_the_same_shapes_share_a_rival(monkeypatch):
    """Whatever their dispatcher: one more copy of the same model would only take memory."""
    monkeypatch.setattr(workers, "fastest", lambda jobs, tell: jobs[0])
    variants = bench.read_variants(bench.parse(["--config", "bench"]))
    chosen = session.rival_jobs("rival_train", session.Session(variants, 1, True, silent), {})
    assert chosen["e8"] is chosen["e8_capacity"]
    names = {job.name for job in chosen.values()}
    assert names == {"dense rival, eager", "e8 rival, grouped_mm", "e64 rival, grouped_mm"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("model.moe.router=switch", "Mixtral's router"),
        ("model.moe.shared_experts=1", "no shared experts"),
        ("model.activation=gelu", "SwiGLU"),
        ('model.period=\'("dense", "moe")\'', "all alike"),
        ("model.attention=sliding_window", "grouped-query"),
        ("model.norm_position=after", "norms before"),
        ("model.logit_cap=30.0", "no cap on logits"),
        ("model.param_dtype=bfloat16", "parameters in float32"),
        ("model.dtype=bfloat16", ""),
        ("model.moe.num_experts=16", ""),
    ],
)
def test_a_model_that_transformers_does_not_have_has_no_rival(change, reason):
    raw = command_line.read(Path("bench:e8"), [f"--config.{change.replace(chr(39), '')}"])
    found = rivals.why_none(config.build(raw, 1))
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--out", "nowhere/x.json"], "--out nowhere/x.json: nowhere is no directory"),
        (["--plot", "x.png"], "--plot x.png draws --what scaling, which is not asked for"),
        (["--against", "nowhere.json"], "--against nowhere.json: no such file"),
        (["--rivals", "--config.model.activation=gelu"], "--rivals: 'dense' has none, for Llama"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        bench.main(["--config", "bench", *flags])


def test_a_job_that_cannot_be_prepared_says_why():
    jobs = [Job("x", "train", "bench", ("--config.model.num_heads=7",))]
    with pytest.raises(UserError, match="num_heads"):
        workers.interleave(jobs, 1, silent)
    with pytest.raises(UserError, match="'y' ended with code 1: KeyError: 'nothing'"):
        workers.interleave([Job("y", "nothing")], 1, silent)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            "x: --config.model.moe.expert=4",
            "--variant x: no key is called --config.model.moe.expert",
        ),
        (
            "x:model.moe.num_experts=4;model.moe.router='switch'",
            "write --variant 'x: --config.model.moe.num_experts=4 "
            "--config.model.moe.router=switch'",
        ),
        ("x: --config.seed='1", "No closing quotation"),
        ("x: --rounds 3", "write --variant 'x: --config.KEY=VALUE --config.KEY=VALUE'"),
    ],
)
def test_a_mistake_in_a_variant_is_one_line(variant, message):
    with pytest.raises(UserError, match=re.escape(message)):
        bench.main(["--config", "configs/base.py", "--variant", variant])
