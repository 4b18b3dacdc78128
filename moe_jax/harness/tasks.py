"""Tasks of the harness from files on this machine: no network is needed.

text:GLOB, jsonl:GLOB, ...     any source of text (data/sources): perplexity of its documents
mmlu:FOLDER[#SUBJECT+...]      MMLU (Hendrycks et al. 2021, arXiv:2009.03300) from its CSV files,
                               FOLDER/test/SUBJECT_test.csv and FOLDER/dev/SUBJECT_dev.csv
anything else                  the name of a task of the harness, or of a file in --include
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.data import sources
from moe_jax.errors import UserError

LETTERS = "ABCD"
MMLU = "mmlu:"


def made(names: Sequence[str]) -> list[str | dict[str, Any]]:
    """Returns what the harness is given for names of tasks: a config, or the name itself.

    Raises UserError for files that are not there or are damaged.
    """
    tasks: list[str | dict[str, Any]] = []
    for name in names:
        if name.startswith(MMLU):
            tasks += mmlu(name.removeprefix(MMLU))
        elif _is_source(name):
            tasks += perplexity(name)
        else:
            tasks.append(name)
    return tasks


def _is_source(name: str) -> bool:
    """Returns whether a name is a source of text: "KIND:PLACE", or "DOMAIN=KIND:PLACE"."""
    before_colon, _, _ = name.partition(":")
    _, _, kind = before_colon.rpartition("=")
    # A kind alone is a source, too, where it is the whole name.
    return kind in sources.SOURCES and (":" in name or kind == name)


def perplexity(spec: str) -> list[dict[str, Any]]:
    """Returns a task for each domain of a source: perplexity of a word and a byte, and bits of a
    byte, by the harness's own formulas.
    """
    domains: dict[str, list[dict[str, str]]] = {}
    for document in sources.read(spec):
        domains.setdefault(document.domain, []).append({"text": document.text})
    # The keys of a task's YAML file, as lm-evaluation-harness has them.
    return [
        {
            "task": domain,
            "custom_dataset": _splits(test=rows),
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": "word_perplexity"},
                {"metric": "byte_perplexity"},
                {"metric": "bits_per_byte"},
            ],
            "metadata": {"version": 1.0},
        }
        for domain, rows in domains.items()
    ]


def mmlu(argument: str) -> list[dict[str, Any]]:
    """Returns a task for each subject of MMLU, with its prompt and its examples."""
    place, _, chosen = argument.partition("#")
    folder = Path(place).expanduser()
    files = folder.glob("test/*_test.csv")
    available = sorted(path.name.removesuffix("_test.csv") for path in files)
    if not available:
        raise UserError(f"{MMLU}{argument}: there is no {folder / 'test' / 'SUBJECT_test.csv'}")
    subjects = chosen.split("+") if chosen else available
    for subject in subjects:
        if subject not in available:
            raise UserError(
                f"{MMLU}{argument}: there is no subject {subject!r}; {len(available)} are there, "
                f"such as {', '.join(available[:3])}"
            )
    return [_of_subject(folder, subject) for subject in subjects]


def _of_subject(folder: Path, subject: str) -> dict[str, Any]:
    """Returns the task of a subject. Its prompt is, letter by letter, that of the authors."""
    rows = {
        "test": _questions(folder / "test" / f"{subject}_test.csv"),
        "dev": _questions(folder / "dev" / f"{subject}_dev.csv"),
    }
    about = subject.replace("_", " ")
    # Of the template: "\nA. {{A}}" and so on, which the harness fills from the question.
    choices = "".join(f"\n{letter}. {{{{{letter}}}}}" for letter in LETTERS)
    return {
        "task": f"mmlu_{subject}",
        "custom_dataset": _splits(**rows),
        "description": (
            f"The following are multiple choice questions (with answers) about {about}.\n\n"
        ),
        "test_split": "test",
        "fewshot_split": "dev",
        # The first examples of the file in its order, as in the paper's code.
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "doc_to_text": "{{question.strip()}}" + choices + "\nAnswer:",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _questions(path: Path) -> list[dict[str, Any]]:
    """Returns the questions of a CSV file: question, four choices, a letter."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    questions = []
    for number, row in enumerate(rows, 1):
        if len(row) != 2 + len(LETTERS) or row[-1] not in LETTERS:
            raise UserError(
                f"{path}, row {number} has {len(row)} fields: a question, four choices and a "
                "letter of A to D are wanted"
            )
        question, *texts, answer = row
        # Under its letter, by which the template asks for it.
        choices = dict(zip(LETTERS, texts, strict=True))
        questions.append({"question": question, **choices, "answer": LETTERS.index(answer)})
    return questions


def _splits(**rows: Sequence[Mapping[str, Any]]) -> Any:
    """Returns a function that gives the harness its data."""

    def load(**kwargs: Any) -> Any:
        # Imported here: it comes with the harness, and training needs none of it.
        from datasets import Dataset, DatasetDict

        del kwargs
        return DatasetDict({name: Dataset.from_list(list(of)) for name, of in rows.items()})

    return load
