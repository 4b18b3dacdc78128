"""Experiments that are programs of their own, and what all of them share on a command line."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import run, sparse_flops, sparse_inputs, studies, writing
from experiments.studies import sparse_training_rules as rules
from moe_jax import config
from moe_jax.config import config_file
from moe_jax.plan import flops


def test_results_keep_the_verdict_that_people_wrote(tmp_path):
    def draw(figure):
        return figure.subplots().plot([0, 1])

    writing.write(tmp_path, "T", ["| a |"], {"a": 1}, draw, (2, 2))
    path = tmp_path / "table.md"
    path.write_text(path.read_text().replace("Not written yet.", "It is so."))
    writing.write(tmp_path, "T", ["| b |"], {"b": 1}, draw, (2, 2))
    assert path.read_text() == "# T\n\n| b |\n\n## Verdict\n\nIt is so.\n"
    assert (
        json.loads((tmp_path / "figures.json").read_text()) == {"b": 1}
        and (tmp_path / "plot.png").stat().st_size > 1000
    )


def built(**changes):
    base = rules.STUDY.base | {key.replace("__", "."): value for key, value in changes.items()}
    return config.build(config_file.read(Path("base"), base), 1)


def sparse(rule, density):
    base = rules.STUDY.base | rules.sparse(rule, density)
    return config.build(config_file.read(Path("base"), base), 1)


def test_training_flops_count_what_is_not_zero():
    cfg = sparse("static", 0.25)
    tokens = cfg.train.batch_size * cfg.data.seq_len
    dense = flops.train_per_token(cfg.model, cfg.data.seq_len) * tokens
    count = sparse_flops.training_flops
    assert count(cfg, [(5, 1.0), (10, 1.0)]) == pytest.approx(10 * dense)
    experts = flops.forward_per_token(cfg.model, cfg.data.seq_len).experts
    less = 3 * 0.75 * experts * tokens
    assert count(cfg, [(10, 0.25)]) == pytest.approx(10 * (dense - less))
    # threshold: the gradient of weights is dense, the other two products are not
    cfg = sparse("threshold", 0.25)
    less = 2 * 0.75 * experts * tokens
    assert count(cfg, [(10, 0.25)]) == pytest.approx(10 * (dense - less))
    # static and narrow of as many weights take as many
    narrow = built(model__moe__expert_hidden=64)
    less = 3 * 0.75 * experts * tokens
    of_narrow = flops.train_per_token(narrow.model, 128) * tokens
    assert of_narrow == pytest.approx(dense - less)
    # What a run has noted: its densities, or nothing where it has no zeros.
    assert sparse_flops.of_run(narrow, {}) == pytest.approx(1000 * of_narrow)


@pytest.mark.parametrize("density", [rules.QUARTER, rules.SIXTEENTH])
def test_magnitude_takes_the_flops_of_the_others(density):
    curve = sparse_flops.magnitude_curve(100, density)
    assert [d for _, d in curve][: sparse_flops.EVERY] == [1] * sparse_flops.EVERY
    assert [d for _, d in curve][-50:] == [density] * 50
    base = rules.STUDY.base
    budget = sparse_flops.budget_of(base, {rules.HIDDEN: round(256 * density)})
    magnitude = rules.sparse("magnitude", density)
    steps = sparse_flops.magnitude_steps(base, magnitude, budget)
    assert rules.FEWER[density] == {"train.steps": steps}


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


def typed(*words, cwd=writing.ROOT):
    """(exit code, standard error) of an experiment that is typed as a script."""
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


def test_an_experiment_may_be_typed_as_a_script(tmp_path):
    """From any directory; what is wrong with its flags is one line, and nothing is made."""
    path = writing.ROOT / "experiments/sparse_savings.py"
    code, said = typed(path, "models", "--no_such_flag", cwd=tmp_path)
    assert (code, said.count("\n")) == (64, 1)
    assert said.startswith("error: ") and "--no_such_flag" in said
    assert not list(tmp_path.iterdir())


def test_every_experiment_finds_its_modules_and_hears_signals_as_a_script():
    beginning = re.compile(
        r'if __name__ == "__main__":.*\n    sys\.path\.insert.*\n(.*\n)*?    '
        r"command_line\.hear_signals\(\)"
    )
    for path in (writing.ROOT / "experiments").glob("*.py"):
        text = path.read_text()
        assert "def main(" not in text or beginning.search(
            text[: text.index("import jax") if "import jax" in text else None]
        )


def test_a_mistake_in_an_experiment_is_one_line(capsys):
    assert sparse_inputs.main(["--peak", "bag"]) == 64
    said = capsys.readouterr().err
    assert "argument --peak: invalid choice" in said and said.count("\n") == 1


def test_a_study_may_be_a_file_of_ones_own(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text((studies.FOLDER / "hash_floor.py").read_text())
    assert run.main([str(path), "--dry_run", "--out", str(tmp_path)]) == 0
    assert re.search(r"hash_floor: (\d+) of \1 cells are missing", capsys.readouterr().out)
    path.write_text("x = 1\n")
    assert run.main([str(path), "--dry_run"]) == 64
    assert "declares no study" in capsys.readouterr().err


def test_ctrl_c_while_an_experiment_begins_is_one_line():
    words = [sys.executable, "experiments/sparse_inputs.py", "--smoke"]
    process = subprocess.Popen(
        words, cwd=writing.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
