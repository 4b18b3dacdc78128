"""Baskets of users with implicit feedback: packages and what they depend on; MovieLens of TFDS.

Users are split, not baskets, and held-out users are strangers to the model ("strong
generalisation", as in Liang et al. 2018, arXiv:1802.05814): of a held-out user's items four in
five, drawn at random but always the same, are shown and the others are to be found. One user in
`heldout_every` is held out, by a hash of the set of items, so equal users are on the same side.

Shapes: B rows (users of a batch), L places of a row.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.data import examples
from moe_jax.data.examples import Examples, Fields, Market, Ragged
from moe_jax.data.records import folder as files
from moe_jax.data.records import tfds_examples
from moe_jax.data.records.split import is_heldout
from moe_jax.errors import UserError

KIND = "recommendation"
# Domains of packages.
FAMILIES = ("lib", "python", "r", "perl", "other")
# Of a held-out user's items.
SHOWN = 0.8
# Stars: from here on a rating is an interaction (Liang et al. 2018).
LIKED = 4.0

# User -> items.
Interactions = Mapping[str, Sequence[str]]
# User -> numbers of items.
Baskets = dict[str, np.ndarray]


def read_debian_depends(folder: str) -> Interactions:
    """Returns the packages of Debian 12 as users, and what they depend on as items."""
    path = files.find(folder, KIND, "debian12_depends.tsv.gz", "debian_depends")
    return {user: items.split() for user, items in files.read_tsv(path, 2, header=True)}


def family(package: str) -> str:
    """Returns what kind of package a name is of: "python3-yaml" -> "python"."""
    if package.endswith("-perl"):
        return "perl"
    first_word = package.partition("-")[0].rstrip("0123456789")
    if first_word in FAMILIES:
        return first_word
    return "lib" if first_word.startswith("lib") else "other"


DATASETS: dict[str, tuple[Callable[[str], Interactions], Callable[[str], str]]] = {
    # How it is read, and the domain of a user.
    "debian_depends": (read_debian_depends, family),
}


def read_tfds(spec: str) -> Interactions:
    """Returns the users of a set of ratings and the items that they gave LIKED stars or more.

    The set has the features user_id, movie_id and user_rating, as tfds:movielens/1m-ratings.
    """
    stored = tfds_examples.open_stored(spec)
    missing = sorted({"user_id", "movie_id", "user_rating"} - set(stored.features))
    if missing:
        raise UserError(
            f"dataset {stored.name} has no feature {', '.join(missing)}: name the ratings of a "
            "MovieLens set"
        )
    users: dict[str, list[str]] = {}
    # One split of the set is read: users are held out here, not by the set.
    for record in stored.records("train", stored.split):
        if float(record.fields["user_rating"]) >= LIKED:
            user = record.text("user_id")
            users.setdefault(user, []).append(record.text("movie_id"))
    return users


class Catalogue(NamedTuple):
    """A set as it was read, and what is particular to it."""

    users: Interactions
    domains: tuple[str, ...]
    # User -> one of `domains`.
    domain_of: Callable[[str], str]
    # The items in the order in which they are numbered.
    order: Callable[[Interactions], list[str]]
    # Items that are kept of that order; None = all.
    most_items: int | None


def read_catalogue(name: str, folder: str, most_items: int) -> Catalogue:
    """Returns the set that a key of DATASETS, or tfds:NAME, stands for.

    `most_items` is for TFDS alone: how many items pass the filters is not known before its set is
    read, so the model cannot be sized for all of them.
    """
    if name.startswith(tfds_examples.PREFIX):

        def only_domain(user: str) -> str:
            del user
            return name

        return Catalogue(read_tfds(name), (name,), only_domain, popular_first, most_items)
    if name not in DATASETS:
        raise files.unknown(KIND, name, [*DATASETS, "tfds:NAME"])
    read, domain_of = DATASETS[name]
    return Catalogue(read(folder), FAMILIES, domain_of, libraries_first, None)


def filtered(users: Interactions, min_items: int, min_users: int) -> dict[str, list[str]]:
    """Returns users with at least `min_items` items that have at least `min_users` users each.

    Items are filtered first, once: an item may have fewer users when users are left out. Each item
    of a user is there once.
    """
    # set: a user who has an item twice counts once.
    users_of_item = Counter(item for items in users.values() for item in set(items))
    kept: dict[str, list[str]] = {}
    for user, items in users.items():
        # A dict keeps the order in which the items first come.
        distinct = dict.fromkeys(items)
        frequent = [item for item in distinct if users_of_item[item] >= min_users]
        if len(frequent) >= min_items:
            kept[user] = frequent
    return kept


def numbered(users: Interactions, items: Sequence[str], min_items: int) -> Baskets:
    """Returns the users' items as their indices in `items`, int32; others are dropped.

    A user is left out who has fewer than `min_items` then.
    """
    number = {item: i for i, item in enumerate(items)}
    baskets: Baskets = {}
    for user, names in users.items():
        kept = [number[item] for item in names if item in number]
        if len(kept) >= min_items:
            baskets[user] = np.array(kept, np.int32)
    return baskets


def split_users(baskets: Baskets, items: Sequence[str], every: int) -> dict[str, list[str]]:
    """Returns the users of "train" and "heldout"; one in `every` is held out.

    The key is the set of the names of the items, sorted: equal users are on the same side, and
    numbering the items differently moves nobody.
    """
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for user, basket in baskets.items():
        names = sorted(items[number] for number in basket)
        key = " ".join(names).encode()
        parts["heldout" if is_heldout(key, every) else "train"].append(user)
    return parts


def open_recommendation(
    name: str,
    folder: str,
    *,
    seq_len: int,
    min_items: int,
    min_users: int,
    most_items: int,
    heldout_every: int,
    seed: int,
) -> Examples:
    """Opens a key of DATASETS, or tfds:NAME, as rows `examples.Baskets` of L = seq_len places.

    `about` is `examples.Market`. A training user's items are its targets too: the task hides some
    of them from the model. Of a list longer than seq_len a fixed random part is taken; to find a
    held-out user's items all of them must have a place. `seed` decides nothing: the same rows for
    every run.

    Packages are numbered with the libraries first; items of TFDS by popularity, of which the
    `most_items` first are kept. So the first items may be a task of their own.
    """
    del seed
    catalogue = read_catalogue(name, folder, most_items)
    if min_items < 2:
        raise UserError(
            f"min_items = {min_items} must be at least 2: one item to show and one to be found"
        )
    users = filtered(catalogue.users, min_items, min_users)
    all_items = catalogue.order(users)
    items = tuple(all_items[: catalogue.most_items])
    baskets = numbered(users, items, min_items)
    parts = split_users(baskets, items, heldout_every)
    if not all(parts.values()):
        raise UserError(
            f"{name} has {len(baskets)} users with at least {min_items} items: too few to hold out "
            f"one in {heldout_every}"
        )
    domain = {
        split: np.array([catalogue.domains.index(catalogue.domain_of(u)) for u in names], np.int32)
        for split, names in parts.items()
    }
    data = _examples(name, market(baskets, items, parts), catalogue.domains, domain, seq_len)
    if len(items) == len(all_items):
        return data
    note = (
        f"of {len(all_items)} items the least popular, {len(all_items) - len(items)}, are left "
        f"out: the model has {catalogue.most_items}"
    )
    return data._replace(notes=(note, *data.notes))


def market(baskets: Baskets, items: tuple[str, ...], parts: dict[str, list[str]]) -> Market:
    """Returns the baskets of both splits, those of held-out users divided."""
    divided_baskets = [divided(user, baskets[user]) for user in parts["heldout"]]
    return Market(
        items=items,
        train=[baskets[user] for user in parts["train"]],
        shown=[shown for shown, _ in divided_baskets],
        hidden=[hidden for _, hidden in divided_baskets],
        users=parts,
    )


def libraries_first(users: Interactions) -> list[str]:
    """Returns the items, those named lib... first, each part by name."""

    def rank(item: str) -> tuple[bool, str]:
        return not item.startswith("lib"), item

    return sorted({item for items in users.values() for item in items}, key=rank)


def popular_first(users: Interactions) -> list[str]:
    """Returns the items by the number of users, the most first; equals by name."""
    users_of_item = Counter(item for items in users.values() for item in items)

    def rank(item: str) -> tuple[int, str]:
        return -users_of_item[item], item

    return sorted(users_of_item, key=rank)


def divided(user: str, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the items (shown, to be found), in an order drawn by the user's name.

    Each part has at least one item.
    """
    # Seeded by the name, not by the run: every run judges the same question.
    random = np.random.default_rng(zlib.crc32(user.encode("utf-8")))
    order = random.permutation(len(items))
    num_shown = max(1, round(SHOWN * len(items)))
    # At least one item is left to be found.
    num_shown = min(num_shown, len(items) - 1)
    return items[order[:num_shown]], items[order[num_shown:]]


def _train_rows(market: Market) -> Ragged:
    """Returns the training users' items, shuffled: a row takes the first, so a part is random."""
    shuffled = [np.concatenate(divided(str(i), items)) for i, items in enumerate(market.train)]
    return examples.ragged(shuffled)


def _examples(
    name: str, market: Market, domains: tuple[str, ...], domain: dict[str, np.ndarray], seq_len: int
) -> Examples:
    """Returns the rows of a market; `domain`: {split: the domain's number of each user}."""
    longest = max(map(len, market.hidden))
    if longest > seq_len:
        raise UserError(
            f"data.seq_len = {seq_len} is too short for {name}: a user has {longest} items to be "
            "found; set at least that"
        )
    # In training the same items are inputs and targets; input dropout hides some (models/mmoe.py).
    train = _train_rows(market)
    inputs = {"train": train, "heldout": examples.ragged(market.shown)}
    targets = {"train": train, "heldout": examples.ragged(market.hidden)}

    def fetch(split: str, index_B: np.ndarray) -> Fields:
        items_BL, valid_BL = examples.padded(inputs[split], index_B, seq_len)
        targets_BL, target_valid_BL = examples.padded(targets[split], index_B, seq_len)
        return {
            "items_BL": items_BL,
            "weight_BL": valid_BL.astype(np.float32),
            "targets_BL": targets_BL,
            "target_weight_BL": target_valid_BL.astype(np.float32),
            "domain_B": domain[split][index_B],
        }

    # The order is part of the fingerprint, which old runs are compared by.
    arrays = [array for rows in (*inputs.values(), *targets.values()) for array in rows]
    arrays += domain.values()
    num_cut = sum(len(items) > seq_len for items in market.train)
    note = f"{num_cut} of {len(market.train)} training users have more than {seq_len} items"
    return Examples(
        spec=name,
        batch_type=examples.Baskets,
        seq_len=seq_len,
        domains=domains,
        rows={"train": len(market.train), "heldout": len(market.shown)},
        fetch=fetch,
        heldout_domain_R=domain["heldout"],
        fingerprint=examples.fingerprint([name, seq_len, market.items, domains], arrays),
        about=market,
        notes=(f"{note}, which are cut",) if num_cut else (),
    )
