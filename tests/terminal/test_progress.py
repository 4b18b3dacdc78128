"""What a run shows: its banner, its live line or its plain lines; and a speed in which nothing but
steps counts.
"""

import contextlib
import io
import re
import time
from types import SimpleNamespace

import jax
import kind_cases
import meshes
import pytest
import tiny
from rich.console import Console

from moe_jax import publish, train
from moe_jax.report import banner
from moe_jax.report.metrics import read_rows
from moe_jax.runtime import clock
from moe_jax.terminal import live_line, progress, units
from moe_jax.terminal.progress import Progress
from moe_jax.version import Source


@pytest.fixture
def wait(monkeypatch):
    """Time that passes only when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def open_progress(terminal, active=True, width=100):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    return Progress(active=active, console=console), out


def started(terminal, total=100, start=0, **options):
    shown, out = open_progress(terminal, **options)
    shown.start(start, total, clock.StepClock(1000))
    return shown, out


def drawn(shown):
    """The live line as it would be drawn now, in the width of its console."""
    lines = shown.console.render_lines(shown._line(), pad=False)
    return "\n".join("".join(segment.text for segment in line) for line in lines)


# The clock


@pytest.mark.parametrize("log_every", [1, 2, 5])
@pytest.mark.parametrize("eval_every", [1, 3, 5, 0])
@pytest.mark.parametrize("start", [0, 7])
def test_the_speed_is_that_of_the_steps_alone(wait, log_every, eval_every, start):
    """Steps of half a second, of which a tenth is a wait for data: whatever else the run does, and
    however often.
    """
    steps = clock.StepClock(1000, step_flops=10**9, peak=4e9)
    wait(60)  # before the first step
    seen = []
    for done in range(start + 1, start + 21):
        with steps.waiting():
            wait(0.05)
        if done == start + 4:
            with steps.paused():  # what comes before a step
                wait(13)
        wait(60 if done == start + 1 else 0.45)  # the first step is compiled
        if done % log_every == 0 or done == start + 1:
            steps.row(done)
            seen.append(steps.figures())
        if eval_every and done % eval_every == 0:
            with steps.paused():
                wait(30)
                with steps.paused():  # a sample within the evaluation
                    wait(5)
        if done % 6 == 0:
            with steps.paused():
                wait(2)  # a save
    assert seen[0] == {"perf/peak_flops": 4e9}  # not known yet
    assert len(seen) > 3
    for figures in seen[1:]:
        assert figures == pytest.approx(
            {
                "perf/peak_flops": 4e9,
                "perf/tokens_per_second": 2000,
                "perf/input_wait": 0.1,
                "perf/tflops": 2e-3,
                "perf/mfu": 0.5,
            }
        )


def test_a_pause_that_fails_ends(wait):
    steps = clock.StepClock(1000)
    steps.row(1)
    with contextlib.suppress(ValueError), steps.paused():
        wait(50)
        raise ValueError
    wait(1)
    steps.row(2)
    assert steps.tokens_per_second == pytest.approx(1000)


def test_a_run_that_evaluates_saves_and_samples_at_every_step_is_as_fast_as_any(
    tmp_path, monkeypatch
):
    """A whole run whose evaluations take half a second: the speed is that of its steps of
    milliseconds.
    """
    make_evaluate = publish.make_evaluate

    def slow(cfg, data):
        evaluate = make_evaluate(cfg, data)

        def slowly(*args):
            time.sleep(0.5)
            return evaluate(*args)

        return slowly

    monkeypatch.setattr(publish, "make_evaluate", slow)
    changes = {
        "model.vocab_size": 256,
        "model.repeats": 1,
        "model.param_dtype": "float32",
        "model.dtype": "float32",
        "data.sources": (("embedded:verse", 1.0),),
        "data.slice_bytes": 20_000,
        "data.heldout_bytes": 2_000,
        "data.seq_len": 32,
        "train.steps": 6,
        "train.batch_size": 8,
        "optim.warmup_steps": 2,
        "eval.every": 1,
        "eval.batches": 1,
        "eval.final_batches": 1,
        "eval.sample_tokens": 0,
        "checkpoint.every": 1,
        "log.every": 2,
        "log.tensorboard": False,
    }
    cfg = tiny.build(changes=changes)
    with jax.set_mesh(meshes.make(1, 1, 1)):
        result = train.run(cfg, tiny.raw(changes), tmp_path, time.monotonic(), "tiny.py")
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 4, 6] and "perf/tokens_per_second" not in rows[0]
    slowest = 8 * 32 / 0.25
    assert all(
        row["perf/tokens_per_second"] > slowest and row["perf/input_wait"] <= 1 for row in rows[1:]
    )
    assert result.tokens_per_second == rows[-1]["perf/tokens_per_second"]
    assert rows[-1]["seconds"] > 2.5 and rows[-1]["tokens"] == 6 * 8 * 32


# Plain lines


def test_plain_lines_are_throttled_and_tell_speed_and_time_left(wait):
    shown, out = started(terminal=False, total=1000)
    wait(60)  # compilation
    for step in range(1, 101):
        wait(0.5)
        shown.update(step, loss=2.0 / step, balance=1.25)
    shown.close()
    lines = out.getvalue().splitlines()
    assert lines[:2] == [progress.FIRST_STEP, "step 1/1000  loss 2.0000  busiest expert 1.25x"]
    # half a second a step: 1000 tokens / 0.5 s; 998 steps are left
    assert lines[2] == "step 2/1000  loss 1.0000  2k tokens/s  busiest expert 1.25x  8m 19s left"
    assert [int(line.split()[1].split("/")[0]) for line in lines[1:]] == [1, 2, 3, 23, 43, 63, 83]


def test_a_process_that_shows_nothing_counts_all_the_same(wait):
    shown, out = started(terminal=False, active=False)
    wait(60)
    shown.update(1, loss=1.0, balance=None)
    for step in range(3, 21, 2):
        with shown.doing("evaluating"):
            wait(30)
        wait(1)
        shown.update(step, loss=1.0, balance=None)
    assert shown._clock.tokens_per_second == pytest.approx(2000)
    shown.message("nothing")
    shown.close()
    assert out.getvalue() == ""


def test_a_resumed_run_counts_from_its_step_and_ends_with_a_line(wait):
    shown, out = started(terminal=False, start=50)
    for step in range(51, 101):
        wait(0.01)
        shown.update(step, loss=float("nan"), balance=None)
    lines = out.getvalue().splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["51/100", "52/100", "53/100", "100/100"]
    assert lines[-1] == "step 100/100  loss nan  100k tokens/s"


def test_activities_in_plain_lines(wait):
    """Each is announced once, before it begins; again only where it took long the last time."""
    shown, out = open_progress(terminal=False)
    with shown.doing("opening the data"):
        assert out.getvalue() == "opening the data\n"
    shown.start(0, 100, clock.StepClock(1000))
    shown.update(1, loss=1.0, balance=None)
    for seconds in (1, 30, 30):
        with shown.doing("evaluating"):
            wait(seconds)
        with shown.doing("saving"):
            pass
    with shown.doing("evaluating"):
        pass
    said = out.getvalue().splitlines()
    assert said[3:] == [
        "step 1: evaluating",
        "step 1: saving",
        "step 1: evaluating",
        "step 1: evaluating",
    ]


def test_a_run_that_is_finished_compiles_no_step():
    shown, out = started(terminal=False, start=100)
    shown.close()
    assert out.getvalue() == ""


# The live line


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_live_line_says_what_happens_and_for_how_long(wait, width):
    shown, _ = open_progress(terminal=True, width=width)
    with shown.doing("opening the data"):
        wait(7)
        assert drawn(shown)[1:].startswith(" opening the data  7s")
    shown.start(0, 100, clock.StepClock(1000))
    wait(75)
    assert "compiling the first step  1m 15s" in drawn(shown) or width == 40
    for step in range(1, 41):
        wait(0.5)
        shown.update(step, loss=1.5, balance=1.1)
    lines = [drawn(shown)]
    assert lines[0][2:].startswith("step 40/100  ")
    assert "loss 1.5000  2k tokens/s  busiest expert 1.10x  30s left" in lines[0] or width == 40
    shown.stepped(43)  # between two logged steps
    assert drawn(shown)[2:].startswith("step 43/100  ")
    wait(20)
    lines.append(drawn(shown))
    assert "20s in this step" in lines[1]
    with shown.doing("evaluating"):
        wait(3)
        lines.append(drawn(shown))
        with shown.doing("drawing a sample"):
            wait(2)
            lines.append(drawn(shown))
    assert "evaluating  3s" in lines[2] and "drawing a sample  2s" in lines[3]
    assert "in this step" not in drawn(shown)  # the pause is no part of the step
    assert all(len(line) <= width and "\n" not in line for line in lines)
    signs = set()
    for _ in range(8):
        wait(0.2)
        signs.add(drawn(shown)[0])
    assert signs == set(live_line.SPINNER)  # it turns although nothing is told
    shown.close()


def test_what_a_terminal_is_left_with(wait):
    shown, out = started(terminal=True)
    for step in range(1, 41):
        wait(0.5)
        shown.update(step, loss=1.5, balance=1.1)
        if step == 20:
            shown.message("a [sample] of text")
    shown.close()
    shown.close()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    assert "a [sample] of text" in lines
    assert re.match(
        r"step 40/100 .* loss 1\.5000  2k tokens/s  busiest expert 1\.10x  30s left", lines[-1]
    )
    codes = re.findall(r"\x1b\[\?25[lh]", out.getvalue())
    assert codes and codes[1::2] == ["\x1b[?25h"] * len(
        codes[1::2]
    )  # shown again at once: a kill cannot hide it


def test_an_error_takes_the_live_line_away():
    shown, _ = open_progress(terminal=True)
    with pytest.raises(ValueError), shown.doing("opening the data"):
        raise ValueError
    assert shown._live is None and not shown._activities


# The banner


class Rows:
    domains = ("drama", "verse", "novel", "scripture_en", "scripture_es", "dictionary")
    seq_len = 256

    def name(self):
        return "embedded"

    def sizes(self, split):
        return [9000, 345] if split == "train" else [512]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_banner(tmp_path, monkeypatch, width):
    monkeypatch.setattr(banner, "source", lambda: Source("0.1.0", "0123456789abcdef", True))
    shown, out = open_progress(terminal=False, width=width)
    with jax.set_mesh(meshes.make(2, 2, 2)):
        cfg = tiny.build((2, 2, 2), {"train.micro_batch_size": 8, "train.stop_at": 50, "seed": 7})
        banner.show(shown, cfg, tmp_path / "run", "configs/vision.py:mnist")
    banner.show_data(shown, Rows())
    banner.show_start(shown, cfg, 0)
    lines = out.getvalue().splitlines()
    labels = [line[: banner.LABEL].strip() for line in lines]
    assert [z for z in labels if z] == [
        "run",
        "model",
        "devices",
        "length",
        "buffer",
        "workdir",
        "data",
        "start",
    ]
    assert all(len(line) <= width for line in lines if str(tmp_path) not in line)
    assert width < 80 or len(lines) <= 9
    told = " ".join(line[banner.LABEL :] for line in lines)
    assert "configs/vision.py:mnist, moe_jax 0.1.0, commit 012345678 with changes" in told
    assert "decoder: 2 MoE layers of 8 (top_k); " in told and " active" in told
    assert "8 x cpu, mesh data 2 x expert 2 x model 2" in told
    assert (
        "100 steps of 16 rows x 8 tokens in 2 micro-batches, 12.8k tokens in all, stopping at 50"
        in told
    )
    assert "dropless: " in told and str(tmp_path / "run") in told
    assert "embedded: 9,345 rows (2.39M tokens), 512 held out; drama" in told or width == 60
    assert "step 0, with fresh parameters (seed 7)" in told


def test_where_a_run_starts_from():
    cfg = tiny.build(changes={"train.init_from": "runs/old"})
    assert banner.start(cfg, 0) == "step 0, with the parameters of runs/old"
    assert banner.start(cfg, 12) == "going on from step 12"


def test_a_long_path_is_never_cut():
    path = "/" + "/".join(["a-very-long-name"] * 9)
    assert path in banner.wrapped(f"step 0, with the parameters of {path}", 60)


@pytest.mark.parametrize("case", kind_cases.CASES)
def test_every_kind_of_model_has_a_line(case):
    cfg = kind_cases.CASES[case]()
    text = banner.model(SimpleNamespace(model=cfg))
    assert re.fullmatch(rf"{cfg.kind}(: .+)?; \S+ parameters, \S+ active", text)


def test_readable_numbers():
    numbers = (0, 12.345, 1234, 56789, 4.2e6, 1e9, 2.5e12)
    assert [units.readable(x) for x in numbers] == [
        "0",
        "12.3",
        "1.23k",
        "56.8k",
        "4.2M",
        "1G",
        "2.5T",
    ]
    assert [units.duration(s) for s in (5.4, 75, 7300, 200000)] == [
        "5s",
        "1m 15s",
        "2h 01m",
        "2d 07h",
    ]
