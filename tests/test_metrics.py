"""Rows survive a kill, a resume takes back what it will repeat, TensorBoard agrees; the progress line and the summary are true."""

import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import models
import numpy as np
import pytest
from rich.console import Console

from moe_jax import metrics, progress, summary, train
from moe_jax.data.baselines import compression_table
from moe_jax.metrics import Writer, read_rows, write_run_info
from moe_jax.progress import Progress
from moe_jax.tasks import TASKS


def open_writer(path, resume_step=0, tensorboard=False, active=True):
    return Writer(path, resume_step=resume_step, tensorboard=tensorboard, active=active)


def events(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(path / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0})
    return accumulator.Reload()


def test_rows_are_whole_precise_and_on_disk_at_once(tmp_path):
    writer = open_writer(tmp_path)
    values = {"loss": jnp.float32(0.1), "lr": 1 / 3, "tokens": jnp.int32(7), "inf": np.float64("inf"), "nan": jnp.nan}
    writer.write(1, values)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith(
        '{"step": 1, "loss": 0.10000000149011612, "lr": 0.3333333333333333, "tokens": 7, "inf": "inf"'
    )
    row = json.loads(text, parse_constant=pytest.fail)  # no bare NaN or Infinity, which are not JSON
    assert np.float32(row["loss"]) == np.float32(0.1)
    assert float(row["inf"]) == np.inf and np.isnan(float(row["nan"]))
    writer.write(2, {"loss": jnp.bfloat16(1.5)})
    assert read_rows(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": 1.5}
    writer.close()


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(20, [10, 20]), (25, [10, 20]), (5, []), (0, []), (100, [10, 20, 30])]
)
def test_a_resume_takes_back_the_rows_it_will_repeat(tmp_path, resume_step, kept):
    writer = open_writer(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": step / 7})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 40, "loss": 0.1')  # torn by a kill
    writer = open_writer(tmp_path, resume_step)
    writer.write(resume_step + 1, {"loss": 9.0})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": s, "loss": s / 7} for s in kept] + [{"step": resume_step + 1, "loss": 9.0}]


def test_a_row_torn_just_before_its_end_of_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}')
    writer = open_writer(tmp_path, resume_step=2)
    writer.write(3, {"loss": 3.0})
    writer.close()
    assert [row["step"] for row in map(json.loads, path.read_text().splitlines())] == [1, 2, 3]


def test_a_killed_process_leaves_every_row_that_it_wrote(tmp_path):
    code = (
        "import sys, os; from moe_jax.metrics import Writer\n"
        "w = Writer(sys.argv[1], resume_step=0, tensorboard=False, active=True)\n"
        "[w.write(i, {'x': i}) for i in range(50)]; os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(50))


def test_tensorboard_events(tmp_path):
    writer = open_writer(tmp_path, tensorboard=True)
    writer.write(3, {"train/loss": jnp.float32(2.5)})
    writer.histogram(3, "load", jnp.array([4.0, 0.0, 12.0]))
    writer.text(3, "sample", "once upon a time")
    writer.image(3, "grey", np.eye(4))
    writer.image(3, "colour", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    read = events(tmp_path)
    [scalar] = read.Scalars("train/loss")
    assert (scalar.step, scalar.value) == (3, 2.5)
    load = read.Histograms("load")[0].histogram_value
    assert (load.bucket_limit, load.bucket) == ([0.5, 1.5, 2.5], [4.0, 0.0, 12.0])
    assert (load.min, load.max, load.num, load.sum, load.sum_squares) == (-0.5, 2.5, 16.0, 24.0, 48.0)
    assert read.Tensors("sample/text_summary")[0].tensor_proto.string_val == [b"once upon a time"]
    assert [(read.Images(t)[0].height, read.Images(t)[0].width) for t in ("grey", "colour")] == [(4, 4), (4, 6)]


@pytest.mark.parametrize(("resume_step", "steps"), [(20, [10, 20, 21]), (0, [1])])
def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path, resume_step, steps):
    for start, written in ((0, (10, 20, 30, 40)), (resume_step, (resume_step + 1,))):  # within one second: two files
        writer = open_writer(tmp_path, start, tensorboard=True)
        for step in written:
            writer.write(step, {"loss": float(step)})
            writer.histogram(step, "load", [1.0, 2.0])
        writer.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    read = events(tmp_path)
    assert [e.step for e in read.Scalars("loss")] == steps
    assert [e.step for e in read.Histograms("load")] == steps


def test_an_inactive_writer_touches_nothing(tmp_path):
    writer = open_writer(tmp_path / "run", tensorboard=True, active=False)
    writer.write(1, {"loss": 1.0})
    writer.histogram(1, "load", [1.0])
    writer.text(1, "sample", "x")
    writer.image(1, "picture", np.eye(2))
    writer.close()
    write_run_info(tmp_path / "run", {}, mesh={}, active=False)
    assert not (tmp_path / "run").exists()


def test_run_info_keeps_the_history_of_starts(tmp_path):
    for seed in (1, 2):
        write_run_info(tmp_path, {"seed": seed, "period": ("moe",)}, mesh={"data": 4, "expert": 2}, active=True)
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 2, "period": ["moe"]}
    first, second = json.loads((tmp_path / "run.json").read_text())
    assert first["started"] <= second["started"] and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["started"])
    assert first["mesh"] == {"data": 4, "expert": 2}
    assert first["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8} and first["processes"] == 1
    assert first["command"] == sys.argv
    versions = first["versions"]
    assert versions["numpy"] == np.__version__ and {"python", "jax", "flax", "optax", "orbax-checkpoint"} < set(
        versions
    )
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


def test_git_state(tmp_path):
    def git(*command):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, "-C", str(tmp_path), *command], check=True, capture_output=True)

    source = tmp_path / "package"
    source.mkdir()
    (source / "__init__.py").write_text("")
    assert metrics.git_state(source) is None  # no repository
    git("init")
    assert metrics.git_state(source) is None  # a repository that does not track the source
    git("add", ".")
    git("commit", "-m", "one")
    state = metrics.git_state(source)
    assert re.fullmatch("[0-9a-f]{40}", state["commit"]) and not state["dirty"]
    (source / "__init__.py").write_text("x = 1\n")
    assert metrics.git_state(source) == {"commit": state["commit"], "dirty": True}


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def open_progress(terminal, active=True, total=100, start=0):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    return Progress(total, start, 1000, active=active, console=console), out


def test_plain_lines_are_throttled_and_tell_speed_and_time_left(clock):
    shown, out = open_progress(terminal=False, total=1000)
    clock(60)  # compilation
    for step in range(1, 101):
        clock(0.5)
        shown.update(step, loss=2.0 / step, balance=1.25)
    shown.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 1/1000  loss 2.0000  busiest expert 1.25x"
    # half a second a step: 1000 tokens / 0.5 s; 998 steps are left
    assert lines[1] == "step 2/1000  loss 1.0000  2k tokens/s  busiest expert 1.25x  8m 19s left"
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 2, 3, 23, 43, 63, 83]


def test_speed_ignores_compilation_and_pauses(clock):
    shown, out = open_progress(terminal=False, active=False)
    assert shown.tokens_per_second == 0.0
    clock(60)
    shown.update(1, loss=1.0, balance=None)
    assert shown.tokens_per_second == 0.0
    for step in range(3, 21, 2):
        clock(30 if step == 11 else 1)  # an evaluation before step 11
        shown.update(step, loss=1.0, balance=None)
    assert shown.tokens_per_second == pytest.approx(2000)
    shown.message("nothing")
    shown.close()
    assert out.getvalue() == ""


def test_a_resumed_run_counts_from_its_step_and_ends_with_a_line(clock):
    shown, out = open_progress(terminal=False, start=50)
    for step in range(51, 101):
        clock(0.01)
        shown.update(step, loss=float("nan"), balance=None)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["51/100", "52/100", "53/100", "100/100"]
    assert lines[-1] == "step 100/100  loss nan  100k tokens/s"


def test_live_line_on_a_terminal(clock):
    shown, out = open_progress(terminal=True)
    for step in range(1, 41):
        clock(0.5)
        shown.update(step, loss=1.5, balance=1.1)
        if step == 20:
            shown.message("a [sample] of text")
    shown.close()
    shown.close()
    lines = [
        line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").split("\n")
    ]
    assert "a [sample] of text" in lines
    assert re.match(
        r"step 40/100 .* loss 1\.5000  2k tokens/s  busiest expert 1\.10x  30s left", lines[-1] or lines[-2]
    )


def test_readable_numbers():
    assert [progress.readable(x) for x in (0, 12.345, 1234, 56789, 4.2e6, 1e9)] == [
        "0",
        "12.3",
        "1.23k",
        "56.8k",
        "4.2M",
        "1G",
    ]
    assert [progress.duration(s) for s in (5.4, 75, 7300, 200000)] == ["5s", "1m 15s", "2h 01m", "2d 07h"]


def test_the_summary_of_a_language_model_on_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "my [" / "bold] run"  # its path is no markup, and has spaces
    workdir.mkdir(parents=True)
    texts = {"verse": b"tiger, tiger, burning bright " * 40, "[/x]": bytes(range(97, 123)) * 30}
    data = SimpleNamespace(domains=tuple(texts), text=lambda split, domain: texts[domain])
    figures = {"domain/verse/bits_per_byte": 2.25, "domain/[/x]/bits_per_byte": 1.5}
    result = train.Result(10, 0, figures, data, 1234.0, "In the [/beginning] " + "was the word " * 9)
    monkeypatch.setenv("COLUMNS", "40")
    summary.show(models.build(), workdir, result, 75.0)
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines()]
    assert result.sample.strip() in lines
    rivals = compression_table(data, 10**6)
    table = {
        cells[0]: cells[1:] for cells in ([c.strip() for c in re.split("[┃│]", line)[1:-1]] for line in lines) if cells
    }
    assert table[""] == ["model", "gzip -9", "xz -9"]
    for name, bits in (("verse", 2.25), ("[/x]", 1.5)):
        assert table[name] == [f"{value:.3f}" for value in (bits, rivals[name]["gzip"], rivals[name]["xz"])]
    assert (
        table["mean"][0] == "1.875"
        and json.loads((workdir / "summary.json").read_text())["rows"]["[/x]"]["model"] == 1.5
    )
    facts = dict(re.split("  +", line, maxsplit=1) for line in lines if re.match("(next|curves|time|metrics)  ", line))
    assert facts["time"] == "1m 15s" and facts["metrics"] == str(workdir / "metrics.jsonl")
    python, *rest = shlex.split(facts["next"])
    assert shutil.which(python) and rest == [
        "-m",
        "moe_jax",
        "generate",
        "--workdir",
        str(workdir),
        "--prompt",
        "In the beginning",
    ]
    assert shlex.split(facts["curves"]) == [python, "-m", "tensorboard.main", "--logdir", str(workdir)]
    assert importlib.util.find_spec("tensorboard.main")


def test_figures_are_written_before_anything_is_shown(tmp_path, monkeypatch):
    data = SimpleNamespace(domains=("a",), text=lambda split, domain: b"abc" * 99)
    monkeypatch.setattr(summary, "facts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        summary.show(models.build(), tmp_path, train.Result(1, 0, {"domain/a/bits_per_byte": 2.0}, data, 0.0, ""), 1.0)
    assert json.loads((tmp_path / "summary.json").read_text())["rows"]["mean"]["model"] == 2.0


def test_a_domain_called_mean_keeps_its_row():
    data = SimpleNamespace(domains=("mean", "mean of all", "a"), text=lambda split, domain: b"abc" * 99)
    bits = {"mean": 1.0, "mean of all": 2.0, "a": 6.0}
    rows = TASKS["lm"].table(
        models.build(), data, {f"domain/{name}/bits_per_byte": value for name, value in bits.items()}
    )
    assert {name: row["model"] for name, row in rows.items()} == {**bits, "mean of all of all": 3.0}
