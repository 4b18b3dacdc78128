"""What a run leaves on disk may be emptied, full or unwritable: one line with the path, and nothing
that was saved is lost.
"""

import errno
import json
import subprocess
import sys
from pathlib import Path

import metrics_cases
import pytest

from moe_jax import main
from moe_jax.checkpoint.store import SaveFailed
from moe_jax.config import config_file
from moe_jax.errors import UserError
from moe_jax.report import event_file
from moe_jax.report.metrics import read_rows, write_run_info
from moe_jax.runtime import starts

ROOT = Path(__file__).parents[2]


def test_a_full_disk_under_the_metrics_is_one_line(tmp_path):
    writer = metrics_cases.open_writer(tmp_path)
    writer.write(1, {"loss": 1.0})
    path = writer._rows.name
    writer._rows.close()
    writer._rows = open("/dev/full", "a")
    with pytest.raises(UserError, match="/dev/full cannot be written: No space left on device"):
        writer.write(2, {"loss": 1.0})
    writer.close()  # what it could not write does not fail once more
    assert [row["step"] for row in read_rows(path)] == [1]


def test_a_full_disk_under_tensorboard_neither_hangs_nor_ends_a_run(tmp_path):
    from tensorboardX import SummaryWriter

    writer = event_file.outlast(SummaryWriter(str(tmp_path), flush_secs=0))
    records = writer.file_writer.event_writer._ev_writer._py_recordio_writer
    records._writer.close()
    records._writer = open("/dev/full", "wb")
    for step in range(100):  # ten fit into its queue
        writer.add_scalar("loss", 1.0, step)
    writer.close()


@pytest.mark.parametrize("text", ["", "[{", "\0\0\0", "null", '{"started": 1}', '["a"]'])
def test_an_emptied_file_does_not_block_a_restart(tmp_path, text):
    for name in ("run.json", "config.json", "metrics.jsonl"):
        (tmp_path / name).write_text(text)
    write_run_info(tmp_path, {"seed": 1}, mesh={"data": 1}, active=True)
    writer = metrics_cases.open_writer(tmp_path, resume_step=5)
    writer.write(6, {"loss": 1.0})
    writer.close()
    assert len(json.loads((tmp_path / "run.json").read_text())) == 1
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}
    [row] = read_rows(tmp_path / "metrics.jsonl")
    assert metrics_cases.without_spent(row) == {"step": 6, "loss": 1.0}


def test_a_run_that_only_evaluates_again_takes_its_row_back(tmp_path):
    writer = metrics_cases.open_writer(tmp_path)
    for step in (5, 10):
        writer.write(step, {"train/loss": 1.0})
        writer.write(step, {"eval/loss": 1.0})
    writer.close()
    again = metrics_cases.open_writer(tmp_path, resume_step=10, evaluates_again=True)
    again.write(10, {"eval/loss": 2.0})
    again.close()
    found = [(row["step"], row.get("eval/loss")) for row in read_rows(tmp_path / "metrics.jsonl")]
    assert found == [(5, None), (5, 1.0), (10, None), (10, 2.0)]


COMMIT = {"git": {"commit": "a" * 40, "dirty": False}}
INSTALLED = {"git": None, "versions": {"moe_jax": "0.1.0"}}


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (COMMIT, COMMIT, None),
        (
            COMMIT,
            {"git": {"commit": "b" * 40, "dirty": True}},
            "commit aaaaaaaaaaaa then, commit bbbbbbbbbbbb with changes now",
        ),
        (COMMIT, INSTALLED, "commit aaaaaaaaaaaa then, moe_jax 0.1.0, without git now"),
        (
            INSTALLED,
            {"versions": {"moe_jax": "0.2.0"}},
            "moe_jax 0.1.0, without git then, moe_jax 0.2.0, without git now",
        ),
        (
            {"git": 3, "versions": 4},
            INSTALLED,
            "of an unknown version, without git then, moe_jax 0.1.0, without git now",
        ),
    ],
)
def test_changed_code_is_told(tmp_path, before, now, told):
    (tmp_path / "run.json").write_text(json.dumps([COMMIT, before, now]))
    notes = starts.changed_code(tmp_path)
    assert notes == [] if told is None else notes[0].endswith(told), notes


def test_the_first_start_has_no_code_to_differ_from(tmp_path):
    assert starts.changed_code(tmp_path) == []
    (tmp_path / "run.json").write_text(json.dumps([COMMIT]))
    assert starts.changed_code(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/routing.png"),
            "runs/x/routing.png: No space left on",
        ),
        (SaveFailed("saving step_00000005 failed"), "saving step_00000005 failed"),
    ],
)
def test_what_cannot_be_written_ends_a_run_with_a_line(monkeypatch, capsys, error, told):
    def launch(argv):
        raise error

    monkeypatch.setattr(main, "launch", launch)
    assert main.main([]) == 64
    assert capsys.readouterr().err.startswith(f"error: {told}")


def test_processes_that_cannot_be_found_are_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "moe_jax.main",
        "--config",
        "configs/debug.py",
        "--workdir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [*command, "--distributed"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 64 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: --distributed: jax cannot bring the processes together: ")


@pytest.mark.parametrize(
    "program", ["exit(3)", "def get_config(arg=None):\n    raise SystemExit('no such set')"]
)
def test_a_config_file_that_ends_the_program_is_one_line(tmp_path, program):
    (tmp_path / "tiny.py").write_text(program)
    with pytest.raises(
        UserError,
        match=r"the config file .*tiny.py ends the program \(SystemExit: (3|no such set)\)",
    ):
        config_file.load(tmp_path / "tiny.py")
