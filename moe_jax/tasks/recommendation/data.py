"""Baskets of users with implicit feedback: packages and what they depend on; MovieLens of TFDS.

Users are split, not baskets, and held-out users are strangers to the model ("strong
generalisation", as in Liang et al. 2018, arXiv:1802.05814): of a held-out user's items four in
five, drawn at random but always the same, are shown and the others are to be found. One user in
`heldout_every` is held out, by a hash of the set of items, so equal users are on the same side.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_jax.data import examples
from moe_jax.data.examples import Examples, Fields, Market
from moe_jax.data.records import folder as files
from moe_jax.data.records import tfds_examples
from moe_jax.data.records.split import is_heldout
from moe_jax.errors import UserError

KIND = "recommendation"
FAMILIES = ("lib", "python", "r", "perl", "other")  # domains of packages
SHOWN = 0.8  # of a held-out user's items
LIKED = 4.0  # stars: from here on a rating is an interaction (Liang et al. 2018)

Interactions = Mapping[str, Sequence[str]]  # user -> items


def read_debian_depends(folder: str) -> Interactions:
    """Packages of Debian 12 as users, what they depend on as items."""
    path = files.find(folder, KIND, "debian12_depends.tsv.gz", "debian_depends")
    return {user: items.split() for user, items in files.read_tsv(path, 2, header=True)}


def family(package: str) -> str:
    """Returns what kind of package a name is of: "python3-yaml" -> "python"."""
    first = package.partition("-")[0].rstrip("0123456789")
    first = "perl" if package.endswith("-perl") else first
    return first if first in FAMILIES else "lib" if first.startswith("lib") else "other"


DATASETS: dict[str, tuple[Callable[[str], Interactions], Callable[[str], str]]] = {
    "debian_depends": (read_debian_depends, family),  # and the domain of a user
}


def read_tfds(spec: str) -> Interactions:
    """A set of ratings with user_id, movie_id and user_rating, such as tfds:movielens/1m-ratings;
    ratings of LIKED or more count.
    """
    stored = tfds_examples.open_stored(spec)
    missing = sorted({"user_id", "movie_id", "user_rating"} - set(stored.features))
    if missing:
        raise UserError(
            f"dataset {stored.name} has no feature {', '.join(missing)}: name the ratings of a "
            "MovieLens set"
        )
    users: dict[str, list[str]] = {}
    for record in stored.records("train", stored.split):
        if float(record.fields["user_rating"]) >= LIKED:
            users.setdefault(record.text("user_id"), []).append(record.text("movie_id"))
    return users


def filtered(users: Interactions, min_items: int, min_users: int) -> dict[str, list[str]]:
    """Items of at least `min_users` users, then users with at least `min_items` of these; each item
    of a user once.
    """
    count = Counter(item for items in users.values() for item in set(items))
    kept = {
        user: [i for i in dict.fromkeys(items) if count[i] >= min_users]
        for user, items in users.items()
    }
    return {user: items for user, items in kept.items() if len(items) >= min_items}


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
    """Opens a key of DATASETS, or tfds:NAME, as rows `examples.Baskets` of L = seq_len places;
    `about` is `examples.Market`.

    A training user's items are its targets too: the task hides some of them from the model. Of a
    list longer than seq_len a fixed random part is taken; to find a held-out user's items all of
    them must have a place. `seed` decides nothing: the same rows for every run. Packages are
    numbered with the libraries first; items of TFDS by popularity, of which the `most_items` first
    are kept, because how many pass the filters is not known before the set is read. So the first
    items may be a task of their own.
    """
    if name.startswith(tfds_examples.PREFIX):
        users, domain_of, domains = read_tfds(name), lambda user: name, (name,)
        order, most = popular_first, most_items
    elif name in DATASETS:
        read, domain_of = DATASETS[name]
        users, domains = read(folder), FAMILIES
        order, most = libraries_first, None
    else:
        raise files.unknown(KIND, name, [*DATASETS, "tfds:NAME"])
    if min_items < 2:
        raise UserError(
            f"min_items = {min_items} must be at least 2: one item to show and one to be found"
        )
    users = filtered(users, min_items, min_users)
    found = order(users)
    items = tuple(found[:most])
    number = {item: i for i, item in enumerate(items)}
    users = {
        user: kept
        for user, some in users.items()
        if len(kept := [i for i in some if i in number]) >= min_items
    }
    baskets = {user: np.array([number[i] for i in some], np.int32) for user, some in users.items()}
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for user, some in users.items():
        parts[
            "heldout" if is_heldout(" ".join(sorted(some)).encode(), heldout_every) else "train"
        ].append(user)
    if not all(parts.values()):
        raise UserError(
            f"{name} has {len(users)} users with at least {min_items} items: too few to hold out "
            f"one in {heldout_every}"
        )
    shown = {user: divided(user, baskets[user]) for user in parts["heldout"]}
    train = [baskets[user] for user in parts["train"]]
    seen, wanted = ([shown[user][side] for user in parts["heldout"]] for side in (0, 1))
    domain = {
        s: np.array([domains.index(domain_of(u)) for u in some], np.int32)
        for s, some in parts.items()
    }
    rows = _rows(name, Market(items, train, seen, wanted, parts), domains, domain, seq_len)
    if len(items) == len(found):
        return rows
    left = (
        f"of {len(found)} items the least popular, {len(found) - len(items)}, are left out: "
        f"the model has {most}"
    )
    return rows._replace(notes=(left, *rows.notes))


def libraries_first(users: Interactions) -> list[str]:
    return sorted(
        {i for some in users.values() for i in some}, key=lambda i: (not i.startswith("lib"), i)
    )


def popular_first(users: Interactions) -> list[str]:
    """By the number of users, the most first; equals by name."""
    count = Counter(item for items in users.values() for item in items)
    return sorted(count, key=lambda item: (-count[item], item))


def divided(user: str, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(shown, to be found): a random order decided by the user's name, at least one item in each
    part.
    """
    order = np.random.default_rng(zlib.crc32(user.encode("utf-8"))).permutation(len(items))
    most = min(max(1, round(SHOWN * len(items))), len(items) - 1)
    return items[order[:most]], items[order[most:]]


def _rows(
    name: str, market: Market, domains: tuple[str, ...], domain: dict[str, np.ndarray], seq_len: int
) -> Examples:
    longest = max(map(len, market.hidden))
    if longest > seq_len:
        raise UserError(
            f"data.seq_len = {seq_len} is too short for {name}: a user has {longest} items to be "
            "found; set at least that"
        )
    shuffled = [divided(str(i), items) for i, items in enumerate(market.train)]
    train = examples.ragged([np.concatenate(both) for both in shuffled])
    shown = {"train": train, "heldout": examples.ragged(market.shown)}
    asked = {"train": train, "heldout": examples.ragged(market.hidden)}

    def fetch(split: str, index_B: np.ndarray) -> Fields:
        items_BL, there_BL = examples.padded(shown[split], index_B, seq_len)
        targets_BL, wanted_BL = examples.padded(asked[split], index_B, seq_len)
        return {
            "items_BL": items_BL,
            "weight_BL": there_BL.astype(np.float32),
            "targets_BL": targets_BL,
            "target_weight_BL": wanted_BL.astype(np.float32),
            "domain_B": domain[split][index_B],
        }

    cut = sum(len(items) > seq_len for items in market.train)
    arrays = [a for part in (*shown.values(), *asked.values()) for a in part] + list(
        domain.values()
    )
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
        notes=(
            f"{cut} of {len(market.train)} training users have more than {seq_len} items, which "
            "are cut",
        )
        if cut
        else (),
    )
