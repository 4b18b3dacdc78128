"""banking77 (Casanueva et al. 2020): two csv files, which are packed as they are."""

import csv
import io

from moe_jax.data.publishers.contract import Converted
from moe_jax.data.publishers.given import Given
from moe_jax.errors import UserError

# sha256 sums of banking_data/*.csv in the publisher's repository, commit 57ec275 of 2022.
DIGESTS = {
    "train": "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    "test": "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
}


def convert(given: Given) -> Converted:
    """Returns both parts, after a look at their columns."""
    files: dict[str, bytes] = {}
    notes: list[str] = []
    for part, digest in DIGESTS.items():
        file = given.one(f"{part}.csv", [digest])
        # newline="": a question may have a line break in quotes.
        rows = csv.DictReader(io.StringIO(file.text(), newline=""))
        if rows.fieldnames != ["text", "category"]:
            columns = ", ".join(rows.fieldnames or [])
            raise UserError(
                f"{file.path} has the columns {columns}, not text, category: give "
                f"banking_data/{part}.csv"
            )
        notes.append(f"{sum(1 for _ in rows):,} questions of the {part} part")
        files[f"classification/banking77_{part}.csv.gz"] = file.data
    return Converted(files, tuple(notes))
