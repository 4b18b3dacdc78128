"""Likelihoods of texts, and tasks from files: what needs no harness."""

import jax
import numpy as np
import pytest
from harness_cases import TEXTS, judged_by_evaluation

from moe_jax.errors import UserError
from moe_jax.harness import tasks
from moe_jax.harness.scoring import Request, Scorer


def test_likelihoods_are_those_of_our_own_evaluation(run):
    tokenizer = run.tokenizer
    requests = [Request([tokenizer.boundary_id], tokenizer.encode(text).tolist()) for text in TEXTS]
    with jax.set_mesh(run.mesh):
        found = Scorer(run, 2)(requests)
        nats, num_bytes = judged_by_evaluation(run)
    assert num_bytes == sum(map(len, TEXTS))
    assert -sum(score.log_likelihood for score in found) == pytest.approx(nats, rel=1e-9)


def test_scores_do_not_depend_on_the_batch(run):
    rng = np.random.default_rng(0)
    requests = [
        Request(rng.integers(0, 256, n).tolist(), rng.integers(0, 256, m).tolist())
        for n, m in ((1, 3), (50, 40), (9, 1), (40, 2))
    ]
    with jax.set_mesh(run.mesh):
        together = Scorer(run, 4)(requests)
        alone = [Scorer(run, 1)([request])[0] for request in requests]
        # Of a long text the end is read.
        ids = [*requests[1].context, *requests[1].continuation][-65:]
        cut = Scorer(run, 1)([Request(ids[:25], ids[25:])])[0]
    for one, other in zip(alone, together, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-9)
        assert one.is_greedy == other.is_greedy
    assert cut.log_likelihood == pytest.approx(alone[1].log_likelihood, abs=1e-9)


def test_the_likeliest_token_is_greedy(run):
    with jax.set_mesh(run.mesh):
        scorer = Scorer(run, 8)
        found = scorer([Request([256, 84], [i]) for i in range(257)])
    best = int(np.argmax([score.log_likelihood for score in found]))
    assert [i for i, score in enumerate(found) if score.is_greedy] == [best]
    assert np.exp([score.log_likelihood for score in found]).sum() == pytest.approx(1, rel=1e-9)


@pytest.fixture
def mmlu(tmp_path):
    rows = '"2, or more?",3,4,5,6,B\nRed?,a,b,c,d,C\n'
    for split in ("test", "dev"):
        (tmp_path / split).mkdir()
        for subject in ("sums", "two_words"):
            (tmp_path / split / f"{subject}_{split}.csv").write_text(rows)
    return tmp_path


def test_questions_from_files(mmlu):
    first, second = tasks.made([f"mmlu:{mmlu}"])
    assert (first["task"], second["task"]) == ("mmlu_sums", "mmlu_two_words")
    assert second["description"].endswith("about two words.\n\n")
    assert "A. {{A}}\nB. {{B}}" in first["doc_to_text"]
    rows = tasks._questions(mmlu / "test" / "sums_test.csv")
    wanted = {"question": "2, or more?", "A": "3", "B": "4", "C": "5", "D": "6", "answer": 1}
    assert rows[0] == wanted
    assert [task["task"] for task in tasks.made([f"mmlu:{mmlu}#two_words"])] == ["mmlu_two_words"]


def test_a_source_is_a_task_for_each_domain_and_a_name_stays():
    found = tasks.made(["embedded:verse,novel", "hellaswag"])
    assert [task["task"] for task in found[:2]] == ["verse", "novel"] and found[2] == "hellaswag"
    assert found[0]["metric_list"][0] == {"metric": "word_perplexity"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mmlu:nowhere", "there is no nowhere/test/SUBJECT_test.csv"),
        ("mmlu:{}#algebra", "there is no subject 'algebra'"),
        ("text:{}/none", "matches no file"),
    ],
)
def test_files_that_are_not_there(mmlu, name, message):
    with pytest.raises(UserError, match=message):
        tasks.made([name.format(mmlu)])


def test_damaged_questions_are_named(mmlu):
    (mmlu / "test" / "sums_test.csv").write_text("a,b,c,d,e,A\nx,y\n")
    with pytest.raises(UserError, match=r"sums_test.csv, row 2 has 2 fields"):
        tasks.made([f"mmlu:{mmlu}"])
