"""`python -m moe_jax data NAME --from FILE|DIR --out data`: makes the files of a task's data set.

It converts what the publisher of the set distributes; nothing is downloaded. Without NAME it lists
the sets: what each is, its licence, where its publisher has it, and which files to give.
"""

import argparse
import pathlib

from moe_jax.data.publishers import table, written
from moe_jax.data.publishers.contract import Published
from moe_jax.data.publishers.given import Given, Source
from moe_jax.errors import UserError
from moe_jax.runtime import shell

REST = """\
digits          comes with scikit-learn: nothing to give
tfds:NAME       sets of TensorFlow Datasets, which its own tool prepares (docs/data.md)"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax data", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("name", nargs="?", help="of the set; without it the sets are listed")
    parser.add_argument(
        "--from",
        dest="given",
        action="extend",
        nargs="+",
        type=pathlib.Path,
        metavar="FILE|DIR",
        help="what the publisher distributes: files, folders, tar or zip archives; may be repeated",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("data"),
        help="the folder for data.folder (default data)",
    )
    parser.add_argument(
        "--any_digest",
        action="store_true",
        help="convert also what is not, bit for bit, the publisher's file",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit code, 0 when the files are there."""
    flags = parse(argv)
    if not flags.name:
        sets = [describe(name, published) for name, published in table.SETS.items()]
        print("\n\n".join([*sets, REST]))
        return 0
    if flags.name not in table.SETS:
        raise UserError(f"data has no set {flags.name!r}: choose one of {', '.join(table.SETS)}")
    published = table.SETS[flags.name]
    if not flags.given:
        raise UserError(
            f"data {flags.name} needs --from FILE|DIR, what its publisher distributes: "
            f"{published.give}"
        )
    convert(flags, published)
    return 0


def convert(flags: argparse.Namespace, published: Published) -> None:
    """Writes the files of a set, and says what they are and what to do with them."""
    given = Given([path.expanduser() for path in flags.given], flags.any_digest)
    converted = published.convert(given)
    lines = [_read(source) for source in given.sources]
    for name, content in converted.files.items():
        path = flags.out / name
        new = written.write(path, content, flags.name, given.sources)
        lines.append(f"wrote {path}" if new else f"{path} is there already, with this content")
    lines.extend(converted.notes)
    if published.config:
        arguments = ("--config", published.config, f"--config.data.folder={flags.out}")
        train = shell.command("moe_jax.main", *arguments, "--workdir", f"runs/{flags.name}")
        lines.append(f"train on it with:\n  {train}")
    print("\n".join(lines))


def _read(source: Source) -> str:
    """Returns the line of a file that was read."""
    checked = f", whose {source.checked} is right" if source.checked else ""
    return f"read {source.name}{checked}"


def describe(name: str, published: Published) -> str:
    """Returns the lines of a set in the list."""
    facts = {"licence": published.licence, "where": published.where, "give": published.give}
    if published.direct:
        facts["or"] = published.direct
    lines = [f"{name:15} {published.what}"]
    lines += [f"  {label:13} {text}" for label, text in facts.items()]
    return "\n".join(lines)
