"""Rows survive a kill, a resume takes back what it will repeat; the record of the starts and the
summary are true.
"""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from metrics_cases import PER_STEP, open_writer, without_spent

from moe_jax import version
from moe_jax.report import summary
from moe_jax.report.metrics import Writer, read_rows, write_run_info
from moe_jax.tasks import TASKS
from moe_jax.tasks.lm.rivals import compression_table


def test_rows_are_whole_precise_and_on_disk_at_once(tmp_path):
    writer = open_writer(tmp_path)
    values = {
        "loss": jnp.float32(0.1),
        "lr": 1 / 3,
        "count": jnp.int32(7),
        "inf": np.float64("inf"),
        "nan": jnp.nan,
    }
    writer.write(1, values)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith('{"step": 1, "seconds": ')
    assert '"loss": 0.10000000149011612, "lr": 0.3333333333333333, "count": 7, "inf": "inf"' in text
    row = json.loads(
        text, parse_constant=pytest.fail
    )  # no bare NaN or Infinity, which are not JSON
    assert np.float32(row["loss"]) == np.float32(0.1)
    assert float(row["inf"]) == np.inf and np.isnan(float(row["nan"]))
    writer.write(2, {"loss": jnp.bfloat16(1.5)})
    assert without_spent(read_rows(tmp_path / "metrics.jsonl")[1]) == {"step": 2, "loss": 1.5}
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
    lines = [without_spent(json.loads(line)) for line in path.read_text().splitlines()]
    assert lines == [{"step": s, "loss": s / 7} for s in kept] + [
        {"step": resume_step + 1, "loss": 9.0}
    ]


def test_a_row_torn_just_before_its_end_of_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}')
    writer = open_writer(tmp_path, resume_step=2)
    writer.write(3, {"loss": 3.0})
    writer.close()
    assert [row["step"] for row in map(json.loads, path.read_text().splitlines())] == [1, 2, 3]


def test_a_killed_process_leaves_every_row_that_it_wrote(tmp_path):
    code = (
        "import sys, os; from moe_jax.report.metrics import PerStep, Writer\n"
        "w = Writer(sys.argv[1], resume_step=0, tensorboard=False, active=True, started=0, "
        "per_step=PerStep(1, 1))\n"
        "[w.write(i, {'x': i}) for i in range(50)]; os.kill(os.getpid(), 9)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(50))


def test_every_row_says_what_was_spent_and_a_resume_goes_on_from_there(tmp_path, monkeypatch):
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    writer = open_writer(tmp_path, started=40.0)
    writer.write(10, {"train/loss": 1.0})
    now[0] = 70.0
    writer.write(20, {"train/loss": 1.0})
    writer.write(20, {"eval/loss": 1.0})
    now[0] = 99.0
    writer.write(30, {"train/loss": 1.0})  # repeated after the kill: so are its seconds
    writer.close()
    now[0] = 7.0  # another process
    writer = open_writer(tmp_path, resume_step=20, started=2.0)
    writer.write(21, {"train/loss": 1.0})
    writer.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    spent = [(row["step"], row["seconds"], row["tokens"], row["flops"]) for row in rows]
    assert spent == [
        (10, 10, 1000, 70_000),
        (20, 30, 2000, 140_000),
        (20, 30, 2000, 140_000),
        (21, 35, 2100, 147_000),
    ]


def test_rows_from_before_they_said_what_was_spent_are_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    writer = open_writer(tmp_path, resume_step=1, started=time.monotonic())
    writer.write(2, {"train/loss": 1.0})
    writer.close()
    old, new = read_rows(tmp_path / "metrics.jsonl")
    assert old == {"step": 1, "train/loss": 2.0} and 0 <= new["seconds"] < 10


def test_an_inactive_writer_touches_nothing(tmp_path):
    options = {
        "resume_step": 0,
        "tensorboard": True,
        "active": False,
        "started": 0.0,
        "per_step": PER_STEP,
    }
    writer = Writer(tmp_path / "run", **options)
    writer.write(1, {"loss": 1.0})
    writer.write_final(1, {"eval/loss": 1.0}, ["eval/loss"])
    writer.hyperparameters({"seed": 1})
    writer.text(1, "sample", "x")
    writer.image(1, "picture", np.eye(2))
    writer.close()
    write_run_info(tmp_path / "run", {}, mesh={}, active=False)
    assert not (tmp_path / "run").exists()


def test_run_info_keeps_the_history_of_starts(tmp_path):
    for seed in (1, 2):
        write_run_info(
            tmp_path, {"seed": seed, "period": ("moe",)}, mesh={"data": 4, "expert": 2}, active=True
        )
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 2, "period": ["moe"]}
    first, second = json.loads((tmp_path / "run.json").read_text())
    assert first["started"] <= second["started"] and re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["started"]
    )
    assert first["mesh"] == {"data": 4, "expert": 2}
    assert (
        first["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8}
        and first["processes"] == 1
    )
    assert first["command"] == sys.argv
    versions = first["versions"]
    assert versions["moe_jax"] == version.source().version
    assert versions["numpy"] == np.__version__ and {
        "python",
        "jax",
        "flax",
        "optax",
        "orbax-checkpoint",
    } < set(versions)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


def test_git_state(tmp_path):
    def git(*command):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(
            ["git", *identity, "-C", str(tmp_path), *command], check=True, capture_output=True
        )

    source = tmp_path / "package"
    source.mkdir()
    (source / "__init__.py").write_text("")
    assert version.git_state(source) is None  # no repository
    git("init")
    assert version.git_state(source) is None  # a repository that does not track the source
    git("add", ".")
    git("commit", "-m", "one")
    state = version.git_state(source)
    assert re.fullmatch("[0-9a-f]{40}", state["commit"]) and not state["dirty"]
    (source / "__init__.py").write_text("x = 1\n")
    assert version.git_state(source) == {"commit": state["commit"], "dirty": True}


def test_an_installed_copy_knows_the_commit_that_pip_took_it_from(monkeypatch):
    noted = [
        '{"url": "https://example.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}',
        '{"url": "x"}',
        None,
    ]
    for text, commit in zip(noted, ("abc", "", ""), strict=True):
        found = SimpleNamespace(read_text=lambda name, text=text: text)
        monkeypatch.setattr(
            version.importlib.metadata, "distribution", lambda package, found=found: found
        )
        assert version.installed_commit() == commit


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "moe_jax.version.__version__"
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.source().version)


def test_the_summary_of_a_language_model_on_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "my [" / "bold] run"  # its path is no markup, and has spaces
    workdir.mkdir(parents=True)
    texts = {"verse": b"tiger, tiger, burning bright " * 40, "[/x]": bytes(range(97, 123)) * 30}
    data = SimpleNamespace(domains=tuple(texts), text=lambda split, domain: texts[domain])
    figures = {"domain/verse/bits_per_byte": 2.25, "domain/[/x]/bits_per_byte": 1.5}
    result = summary.Result(
        10, 0, figures, data, 1234.0, "In the [/beginning] " + "was the word " * 9
    )
    monkeypatch.setenv("COLUMNS", "40")
    summary.show(tiny.build(), workdir, result, 75.0)
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines()]
    assert result.sample.strip() in lines
    rivals = compression_table(data, 10**6)
    rows = [re.split("  +", line) for line in lines]
    assert ["model", "gzip -9", "xz -9"] in rows
    table = {name: cells for name, *cells in rows}
    for name, bits in (("verse", 2.25), ("[/x]", 1.5)):
        assert table[name] == [
            f"{value:.3f}" for value in (bits, rivals[name]["gzip"], rivals[name]["xz"])
        ]
    assert (
        table["mean"][0] == "1.875"
        and json.loads((workdir / "summary.json").read_text())["rows"]["[/x]"]["model"] == 1.5
    )
    facts = dict(
        re.split("  +", line, maxsplit=1)
        for line in lines
        if re.match("(next|curves|time|metrics)  ", line)
    )
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
    assert shlex.split(facts["curves"]) == [
        python,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(workdir),
    ]
    assert importlib.util.find_spec("tensorboard.main")


def test_figures_are_written_before_anything_is_shown(tmp_path, monkeypatch):
    data = SimpleNamespace(domains=("a",), text=lambda split, domain: b"abc" * 99)
    monkeypatch.setattr(summary, "facts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        summary.show(
            tiny.build(),
            tmp_path,
            summary.Result(1, 0, {"domain/a/bits_per_byte": 2.0}, data, 0.0, ""),
            1.0,
        )
    assert json.loads((tmp_path / "summary.json").read_text())["rows"]["mean"]["model"] == 2.0


def test_a_domain_called_mean_keeps_its_row():
    data = SimpleNamespace(
        domains=("mean", "mean of all", "a"), text=lambda split, domain: b"abc" * 99
    )
    bits = {"mean": 1.0, "mean of all": 2.0, "a": 6.0}
    rows = TASKS["lm"].comparison(
        tiny.build(), data, {f"domain/{name}/bits_per_byte": value for name, value in bits.items()}
    )
    assert {name: row["model"] for name, row in rows.items()} == {**bits, "mean of all of all": 3.0}


def test_the_closing_table_on_80_columns(tmp_path, capsys, monkeypatch):
    """The title is one line, and what is no number, such as the signature of a BLEU, stands below
    the table.
    """
    signature = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.5.1"
    rows = {
        "source copied": {"BLEU": 3.25, "chrF": 20.5, "signature": signature},
        "nearest neighbour (TF-IDF)": {"BLEU": 11.125, "chrF": 30.5, "signature": signature},
        "model": {"BLEU": 17.5, "chrF": 41.75, "signature": signature},
    }
    title = "held-out translations (higher is better)"
    task = TASKS["lm"]._replace(title=title, comparison=lambda *_: rows)
    monkeypatch.setitem(summary.TASKS, "lm", task)
    monkeypatch.setenv("COLUMNS", "80")
    summary.show(tiny.build(), tmp_path, summary.Result(1, 0, {}, None, 0.0, ""), 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert task.title in lines and f"signature     {signature}" in lines
    table = lines[lines.index(task.title) + 1 : lines.index(f"signature     {signature}")]
    # A header, three rows and three lines around them: no cell takes a second line.
    assert len(table) == 7 and max(map(len, table)) < 80
    assert "nearest neighbour (TF-IDF)  11.125  30.500" in [line.strip() for line in table]
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == rows


def test_words_that_differ_stand_below_the_table_for_each_row():
    rows = {"a": {"F1": 1.0, "how": "one"}, "b": {"F1": 2.0, "how": "other"}}
    assert summary.words(rows) == {"how, a": "one", "how, b": "other"}
    assert summary.words({"a": {"F1": 1.0}}) == {}
