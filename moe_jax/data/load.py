"""Opens the packed text of a run: prepared directories and embedded text, one or a mixture."""

import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.data import sources
from moe_jax.data.batches import PackedText
from moe_jax.data.embedded import open_embedded
from moe_jax.data.pack import Rows, interleaved, positions
from moe_jax.data.part import Part
from moe_jax.data.prepared import open_prepared
from moe_jax.data.sources import SOURCES
from moe_jax.data.survey import Counts
from moe_jax.data.tokenizer.contract import Tokenizer
from moe_jax.errors import UserError


class Dataset(NamedTuple):
    """Packed text of one source or of several; fulfils data/contract.py."""

    parts: tuple[Part, ...]
    # Of the parts in the training stream, summing to 1.
    weights: tuple[float, ...]
    # Of all parts; a name that several parts share is one domain.
    domains: tuple[str, ...]
    tokenizer: Tokenizer
    seq_len: int
    # SHA-256 of the parts' fingerprints and the weights.
    fingerprint: str

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for part in self.parts for note in part.notes)

    def num_rows(self, split: str) -> int:
        return sum(self.sizes(split))

    def sizes(self, split: str) -> list[int]:
        """Returns the number of rows of each part."""
        return [getattr(part, split).num_rows for part in self.parts]

    def name(self) -> str:
        return ", ".join(part.spec for part in self.parts)

    def save(self, workdir: pathlib.Path) -> None:
        """Writes the tokenizer, for `tokenizer.load(workdir / "tokenizer")`."""
        self.tokenizer.save(workdir / "tokenizer")

    def batch(
        self,
        split: str,
        part_B: np.ndarray,
        index_B: np.ndarray,
        row_B: np.ndarray,
        valid_B: np.ndarray,
    ) -> PackedText:
        """Returns the rows `index_B` of the parts `part_B`; padding where not `valid_B`."""
        fetched = self.fetch(split, part_B, index_B)
        # 0 in every field is padding: segment 0, target 0.
        rows = fetched.each(lambda field: np.where(valid_B[:, None], field, 0))
        return PackedText(
            tokens_BS=rows.tokens_RS,
            targets_BS=rows.targets_RS,
            segment_BS=rows.segment_RS,
            position_BS=positions(rows.segment_RS),
            domain_BS=rows.domain_RS,
            row_B=row_B,
            quiet_BS=() if rows.quiet_RS is None else rows.quiet_RS,
        )

    def heldout_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (part_R, index_R) of all held-out rows, one of each domain in turn."""
        sizes = self.sizes("heldout")
        # All rows of the first part, then all of the second, and so on.
        part_R = np.repeat(np.arange(len(sizes)), sizes)
        index_R = np.concatenate([np.arange(size) for size in sizes])
        domain_ids = self._domain_ids()
        domain_R = np.concatenate(
            [ids[part.heldout_domain_R] for ids, part in zip(domain_ids, self.parts)]
        )
        # By the numbers of the whole dataset, so a domain that two parts share takes one turn.
        order_R = interleaved(domain_R)
        return part_R[order_R], index_R[order_R]

    def text(self, split: str, domain: str) -> bytes:
        """Returns the documents of a domain one after another.

        Prepared directories keep only the first 4 MB of each.
        """
        return b"".join(part.text(split, domain) for part in self.parts if domain in part.domains)

    def text_bytes(self, split: str) -> dict[str, int]:
        """Returns the bytes of text of each domain."""
        return _total(self.domains, [part.text_bytes for part in self.parts], split)

    def byte_scale(self) -> np.ndarray:
        """Returns the bytes of held-out text per byte that its ids stand for, float64 [Z].

        It is 1 unless the tokenizer normalises, has an unknown token or puts a space before each
        document (Tokenizer.token_bytes counts the bytes of an id).
        """
        text_bytes = self.text_bytes("heldout")
        piece_bytes = dict.fromkeys(self.domains, 0)
        for part in self.parts:
            for domain, size in part.heldout_piece_bytes.items():
                piece_bytes[domain] += size
        # Bits per byte count the bytes of the text, as gzip and xz do.
        return np.array([text_bytes[domain] / piece_bytes[domain] for domain in self.domains])

    def documents(self, split: str) -> dict[str, int]:
        """Returns the number of documents of each domain."""
        return _total(self.domains, [part.documents for part in self.parts], split)

    def fetch(self, split: str, part_N: np.ndarray, index_N: np.ndarray) -> Rows:
        """Returns rows [n] of int32 by part and index in it, with the dataset's domain numbers."""
        domain_ids = self._domain_ids()
        shape = (len(part_N), self.seq_len)
        # Where everything is learned the field is left out: old runs have no such array.
        has_quiet = any(part.has_quiet for part in self.parts)
        fields = Rows._fields if has_quiet else Rows._fields[:-1]
        fetched = Rows(*(np.zeros(shape, np.int32) for _ in fields))
        for part in np.unique(part_N):
            # Each part gives its rows in one call, whatever their order in the batch.
            of_part = part_N == part
            rows = getattr(self.parts[part], split).fetch(index_N[of_part])
            for field, values in zip(fetched, rows):
                # What a part has not is 0.
                if field is not None and values is not None:
                    field[of_part] = values
            # A part numbers its own domains; the dataset numbers those of all parts.
            fetched.domain_RS[of_part] = domain_ids[part][rows.domain_RS]
        return fetched

    def _domain_ids(self) -> list[np.ndarray]:
        """Returns for each part the dataset's numbers of its domains."""
        return _domain_ids(self.domains, tuple(part.domains for part in self.parts))


def _total(domains: Sequence[str], counts: Sequence[Counts], split: str) -> dict[str, int]:
    """Returns the sum of the parts' counts for each domain."""
    return {domain: sum(count[split].get(domain, 0) for count in counts) for domain in domains}


@functools.cache
def _domain_ids(domains: tuple[str, ...], parts: tuple[tuple[str, ...], ...]) -> list[np.ndarray]:
    """Returns for each part the numbers in `domains` of the part's domains."""
    return [np.array([domains.index(name) for name in part], np.int32) for part in parts]


def open_dataset(
    specs: Sequence[tuple[str, float]],
    *,
    seq_len: int,
    slice_bytes: int,
    heldout_bytes: int,
    heldout_every: int,
    seed: int,
) -> Dataset:
    """Opens (spec, weight) pairs as one dataset.

    A spec is a prepared directory, or a source that a run packs itself, now (sources/contract.py),
    such as `embedded[:DOMAIN,...]`. For these are `slice_bytes` and `heldout_bytes` (text of each
    domain, 0 = all), `heldout_every` and `seed` (order of documents); a prepared directory has its
    own. Raises UserError if a spec is neither, or if the specs do not go together.
    """
    _check_specs(specs)
    parts = tuple(
        _open(
            spec,
            seq_len=seq_len,
            slice_bytes=slice_bytes,
            heldout_bytes=heldout_bytes,
            heldout_every=heldout_every,
            seed=seed,
        )
        for spec, _ in specs
    )
    _check_parts(parts, specs, seq_len)
    total = sum(weight for _, weight in specs)
    # Weights are shares from here on.
    weights = tuple(weight / total for _, weight in specs)
    # A dict keeps the order in which the names first come.
    domains = tuple(dict.fromkeys(name for part in parts for name in part.domains))
    return Dataset(
        parts, weights, domains, parts[0].tokenizer, seq_len, _fingerprint(parts, weights)
    )


def _fingerprint(parts: Sequence[Part], weights: Sequence[float]) -> str:
    """Returns the part's own fingerprint, or of several parts the sha256 of theirs and weights."""
    if len(parts) == 1:
        return parts[0].fingerprint
    weighted = json.dumps([[part.fingerprint, weight] for part, weight in zip(parts, weights)])
    return hashlib.sha256(weighted.encode()).hexdigest()


def _check_specs(specs: Sequence[tuple[str, float]]) -> None:
    """Raises UserError if `specs` is not a list of pairs (source, weight above 0)."""
    expected = 'data.sources must be pairs of a source and its weight, as in (("embedded", 1.0),)'
    if not isinstance(specs, tuple | list) or not specs:
        raise UserError(f"{expected}; it is {specs!r}")
    for pair in specs:
        types = [type(value) for value in pair] if isinstance(pair, tuple | list) else []
        if types not in ([str, float], [str, int]):
            raise UserError(f"{expected}; it has {pair!r} in it")
        spec, weight = pair
        if not 0 < weight < math.inf:
            raise UserError(
                f"data.sources: the weight {weight} of {spec} must be above 0; leave a source "
                "out that is not wanted"
            )


def _open(
    spec: str, *, seq_len: int, slice_bytes: int, heldout_bytes: int, heldout_every: int, seed: int
) -> Part:
    """Opens one spec.

    Raises UserError if it is neither a prepared directory nor a source that a run packs itself.
    """
    if os.path.isdir(spec):
        return open_prepared(pathlib.Path(spec))
    try:
        kind = sources.parse(spec).kind
    except UserError:
        packed_now = [name for name, source in SOURCES.items() if source.packed_by_run]
        others = " or ".join(sources.syntax(name) for name in packed_now)
        raise UserError(
            f"data.sources: {spec!r} is neither a prepared directory nor {others}"
        ) from None
    if not SOURCES[kind].packed_by_run:
        raise UserError(
            f"data.sources: {spec!r} must be prepared first: `python -m moe_jax prepare --source "
            f"'{spec}' --out DIR`, then name DIR here"
        )
    return open_embedded(
        spec,
        seq_len=seq_len,
        slice_bytes=slice_bytes,
        heldout_bytes=heldout_bytes,
        heldout_every=heldout_every,
        seed=seed,
    )


def _check_parts(parts: Sequence[Part], specs: Sequence[tuple[str, float]], seq_len: int) -> None:
    """Raises UserError if a part has another row length, or not the tokenizer of the first one."""
    for part, (spec, _) in zip(parts, specs):
        if part.seq_len != seq_len:
            raise UserError(
                f"data.sources: {spec} was prepared with seq_len {part.seq_len}, but data.seq_len "
                f"is {seq_len}: set that, or prepare it again"
            )
        if part.tokenizer.fingerprint != parts[0].tokenizer.fingerprint:
            raise UserError(
                f"data.sources: {spec} has tokenizer {part.tokenizer.name}, but {specs[0][0]} has "
                f"{parts[0].tokenizer.name}: prepare all with one (--tokenizer "
                "file:DIR/tokenizer/tokenizer.json takes that of a prepared DIR)"
            )
