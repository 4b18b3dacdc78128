"""The rated sentences of VADER (Hutto & Gilbert 2014): a file with tabs for each of four domains.

A line of *_GroundTruth.txt has an id, the mean rating from -4 to 4, and the sentence.
"""

from moe_jax.data.publishers.contract import Converted
from moe_jax.data.publishers.given import Given, GivenFile
from moe_jax.data.publishers.written import tsv
from moe_jax.errors import UserError

# Of each domain: its file in the publisher's hutto_ICWSM_2014.tar.gz, and its sha256 sum.
DOMAINS = {
    "movie": (
        "movieReviewSnippets_GroundTruth.txt",
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    ),
    "amazon": (
        "amazonReviewSnippets_GroundTruth.txt",
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    ),
    "nyt": (
        "nytEditorialSnippets_GroundTruth.txt",
        "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
    ),
    "tweets": (
        "tweets_GroundTruth.txt",
        "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
    ),
}


def convert(given: Given) -> Converted:
    """Returns the sentences of all domains; ratings are rounded to three places."""
    rows = [("domain", "valence", "text")]
    for domain, (name, digest) in DOMAINS.items():
        for valence, text in _rated(given.one(name, [digest])):
            rows.append((domain, valence, text))
    files = {"classification/vader_sentiment_4domains.tsv.gz": tsv(rows)}
    return Converted(files, (f"{len(rows) - 1:,} sentences of {len(DOMAINS)} domains",))


def _rated(file: GivenFile) -> list[tuple[str, str]]:
    """Returns (rating, sentence) of each line. Raises UserError for a line that is none."""
    rows: list[tuple[str, str]] = []
    for number, line in enumerate(file.text().splitlines(), 1):
        if not line.strip():
            continue
        # A line with more or fewer tabs is a ValueError too.
        try:
            _, valence, text = line.split("\t")
            rows.append((str(round(float(valence), 3)), text.strip()))
        except ValueError:
            message = f"{file.path}, line {number} is not: id, rating, sentence with tabs between"
            raise UserError(message) from None
    return rows
