"""A run in lm-evaluation-harness: against our own evaluation, and against transformers with the
exported model. They need the extra [eval].
"""

import json
import math

import jax
import pytest
from harness_cases import TEXTS, judged_by_evaluation

from moe_jax.__main__ import main as entry
from moe_jax.commands.evaluate import table
from moe_jax.errors import UserError
from moe_jax.harness import tasks

lm_eval = pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

QUESTIONS = [("2 + 2?", "3", "4", "5", "6", "B"), ("Red?", "a", "b", "c", "d", "C")] * 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "words.jsonl").write_text("\n".join(lines))
    for split, rows in (("test", QUESTIONS), ("dev", QUESTIONS[:2])):
        (folder / split).mkdir()
        text = "\n".join(",".join(row) for row in rows)
        (folder / split / f"sums_{split}.csv").write_text(text)
    return folder


def evaluated(run, wanted, **options):
    from moe_jax.harness.manager import manager_for
    from moe_jax.harness.model import HarnessModel

    with jax.set_mesh(run.mesh):
        model = HarnessModel(run, batch_size=2)
        manager = manager_for([], None)
        return lm_eval.simple_evaluate(
            model, tasks=wanted, task_manager=manager, bootstrap_iters=0, **options
        )


def test_perplexities_are_those_of_our_own_evaluation(run, files):
    found = evaluated(run, tasks.made([f"jsonl:{files}/words.jsonl"]))["results"]["words"]
    with jax.set_mesh(run.mesh):
        nats, num_bytes = judged_by_evaluation(run)
    words = sum(len(text.split()) for text in TEXTS)
    assert num_bytes == sum(len(text.encode()) for text in TEXTS)
    for name, value in (
        ("word_perplexity", math.exp(nats / words)),
        ("byte_perplexity", math.exp(nats / num_bytes)),
        ("bits_per_byte", nats / num_bytes / math.log(2)),
    ):
        assert found[f"{name},none"] == pytest.approx(value, rel=1e-6)


def test_the_table_is_that_of_transformers(run, files, tmp_path):
    # What the harness itself needs for models of transformers.
    for library in ("accelerate", "peft"):
        pytest.importorskip(library, reason="lm-eval[hf] is not installed")
    from lm_eval.models.huggingface import HFLM

    from moe_jax.harness.manager import manager_for

    exported = tmp_path / "hf"
    flags = ["--workdir", str(run.workdir), "--to", str(exported), "--dtype", "float64"]
    assert entry(["convert", "export", *flags]) == 0
    names = {f"mmlu:{files}": None, f"jsonl:{files}/words.jsonl": False}
    for name, add_bos in names.items():
        wanted = tasks.made([name])
        shots = 2 if name.startswith("mmlu") else None
        ours = evaluated(run, wanted, num_fewshot=shots)
        # transformers would count the boundary before a text as a word of it.
        bos = {} if add_bos is None else {"add_bos_token": add_bos}
        # Their grouped product of experts has no float64.
        bos["experts_implementation"] = "eager"
        theirs = lm_eval.simple_evaluate(
            HFLM(pretrained=str(exported), dtype="float64", device="cpu", batch_size=2, **bos),
            tasks=wanted,
            num_fewshot=shots,
            task_manager=manager_for([], None),
            bootstrap_iters=0,
        )
        if shots:
            assert table(ours) == table(theirs)
            continue
        # A model with first values has perplexities of so many digits that rounding is printed.
        for metric in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
            value = theirs["results"]["words"][metric]
            assert ours["results"]["words"][metric] == pytest.approx(value, rel=1e-6)


def test_answers_are_generated(run):
    from moe_jax.harness.model import HarnessModel

    with jax.set_mesh(run.mesh):
        model = HarnessModel(run, batch_size=2)
        asked = [
            lm_eval.api.instance.Instance("generate_until", {}, (text, settings), i)
            for i, (text, settings) in enumerate(
                [("To be", {"until": ["\n"], "max_gen_toks": 5}), ("Or", {"max_gen_toks": 3})]
            )
        ]
        texts = model.generate_until(asked)
    assert len(texts) == 2 and "\n" not in texts[0]


def test_the_command(run, files, tmp_path, capsys):
    flags = ["evaluate", "--workdir", str(run.workdir), "--batch_size", "2"]
    out = tmp_path / "deep" / "results.json"
    names = f"mmlu:{files},jsonl:{files}/words.jsonl"
    assert entry([*flags, "--tasks", names, "--limit", "2", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "|mmlu_sums" in told and "byte_perplexity" in told
    heading = next(line for line in told.splitlines() if "Version" in line)
    assert {"Tasks", "Metric", "Stderr"} <= {name.strip() for name in heading.split("|")}
    kept = json.loads(out.read_text())
    assert kept["step"] == 0 and kept["results"]["mmlu_sums"]["sample_len"] == 2
    for more, message in (
        (["--tasks", f"mmlu:{tmp_path}"], "there is no"),
        (["--tasks", f"mmlu:{files}#algebra"], "there is no subject 'algebra'"),
        (["--tasks", f"text:{tmp_path}/none"], "matches no file"),
        (["--tasks", "a", "--limit", "0"], "--limit 0 must be at least 1"),
        (["--tasks", "a", "--include", str(tmp_path / "none")], "is no directory"),
    ):
        assert entry([*flags, *more]) == 64
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


@pytest.mark.full
def test_an_unknown_task_has_a_hint():
    from moe_jax.harness.manager import manager_for

    with pytest.raises(UserError, match="did you mean hellaswag"):
        manager_for(["helaswag"], None)
