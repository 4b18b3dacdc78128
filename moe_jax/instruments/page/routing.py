"""What a record of routing says, as plain arrays: load, co-activation, typical tokens, paths,
saturation, and which experts of two runs are each other's.

Shapes: L MoE layers, N tokens that are no padding, K choices of a token, E experts; the expert
E stands for nowhere.
"""

import itertools
from typing import NamedTuple

import numpy as np

# An expert with less than this share of the even load counts as dead.
DEAD = 0.01
# A token that occurs less often is typical of nothing.
LEAST_COUNT = 5
SHUFFLES = 20


class Record(NamedTuple):
    """The routing of held-out tokens, without padding."""

    # [L, N, K]: E = nowhere. Choices are in the order of falling gates.
    expert: np.ndarray
    gate: np.ndarray
    dropped: np.ndarray
    # [N]: id, position in its row, domain, and the row.
    token: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    row: np.ndarray
    num_experts: int


def in_order(record: Record) -> Record:
    """Returns the record with the choices of each token by falling gate, nowhere last."""
    is_real = record.expert < record.num_experts
    # A choice of nowhere counts as the smallest gate there can be.
    order = np.argsort(np.where(is_real, -record.gate, np.inf), axis=-1, kind="stable")

    def sort(z: np.ndarray) -> np.ndarray:
        return np.take_along_axis(z, order, -1)

    return record._replace(
        expert=sort(record.expert), gate=sort(record.gate), dropped=sort(record.dropped)
    )


def chosen(record: Record) -> np.ndarray:
    """Returns [L, N, E], bool: which experts a token goes to."""
    num_layers, num_tokens, _ = record.expert.shape
    # One column more, for nowhere, which is cut off again.
    chosen_LNE = np.zeros((num_layers, num_tokens, record.num_experts + 1), bool)
    np.put_along_axis(chosen_LNE, record.expert.astype(np.int64), True, -1)
    return chosen_LNE[..., :-1]


def load(chosen_LNE: np.ndarray) -> np.ndarray:
    """Returns [L, E]: the load of each expert over the mean of its layer."""
    counts_LE = chosen_LNE.sum(1).astype(float)
    mean_L1 = counts_LE.mean(1, keepdims=True)
    # A layer that serves nobody has no load.
    return counts_LE / np.where(mean_L1 > 0, mean_L1, 1)


def dead(load_LE: np.ndarray) -> list[tuple[int, int]]:
    """Returns (layer, expert) of the experts that get less than DEAD of the even load."""
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(load_LE < DEAD)]


def drops(record: Record) -> np.ndarray:
    """Returns [L, E]: the share of an expert's assignments that were dropped; 0 of none."""
    num_experts = record.num_experts
    shares = []
    for expert_NK, dropped_NK in zip(record.expert, record.dropped, strict=True):
        # One place more, for nowhere, which is cut off again.
        num_all = np.bincount(expert_NK.ravel(), minlength=num_experts + 1)
        num_dropped = np.bincount(expert_NK[dropped_NK], minlength=num_experts + 1)
        share = num_dropped / np.maximum(num_all, 1)
        shares.append(share[:num_experts])
    return np.array(shares)


def coactivation(chosen_LNE: np.ndarray) -> np.ndarray:
    """Returns [L, E, E]: the share of the tokens of expert i that go to expert j, too.

    It is the co-activation of Muennighoff et al. 2024 (OLMoE, arXiv:2409.02060, section 5.2).
    """
    x_LNE = chosen_LNE.astype(np.float32)
    # Tokens that go to both; on the diagonal, those that go to one.
    both_LEE = np.einsum("lni,lnj->lij", x_LNE, x_LNE)
    own_LE = np.einsum("lii->li", both_LEE).copy()
    share_LEE = both_LEE / np.maximum(own_LE, 1)[:, :, None]
    # An expert with itself is always 1, and says nothing.
    diagonal = np.arange(share_LEE.shape[1])
    share_LEE[:, diagonal, diagonal] = 0
    return share_LEE


def saturation(chosen_LNE: np.ndarray, last_LNE: np.ndarray) -> np.ndarray:
    """Returns [L]: the share of the last routing's assignments that an earlier one has, too.

    It is the router saturation of Muennighoff et al. 2024 (OLMoE, arXiv:2409.02060, section 5.1).
    """
    in_both_LNE = chosen_LNE & last_LNE
    num_both_L = in_both_LNE.sum((1, 2))
    num_last_L = last_LNE.sum((1, 2))
    return num_both_L / np.maximum(num_last_L, 1)


class Information(NamedTuple):
    """Mutual information with the first choice in bits [L], and what chance gives."""

    bits: np.ndarray
    chance: np.ndarray


def information(record: Record, label_N: np.ndarray, seed: int = 0) -> Information:
    """Returns how many bits the first choice of a token tells about a label of it.

    Tokens weigh the same. "chance" is the mean over SHUFFLES draws in which the labels are dealt
    out anew: with many labels and few tokens it is far from 0.
    """
    rng = np.random.default_rng(seed)
    # Numbered from 0 without gaps.
    _, label_N = np.unique(label_N, return_inverse=True)
    bits, chance = [], []
    for expert_NK in record.expert:
        first_N = expert_NK[:, 0]
        bits.append(_bits(first_N, label_N))
        shuffled = [_bits(first_N, rng.permutation(label_N)) for _ in range(SHUFFLES)]
        chance.append(float(np.mean(shuffled)))
    return Information(np.array(bits), np.array(chance))


def _bits(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Returns I(a; b) = H(a) + H(b) - H(a, b) in bits."""
    # A number of its own for each pair.
    pair_N = a_N.astype(np.int64) * (int(b_N.max()) + 1) + b_N
    return max(_entropy(a_N) + _entropy(b_N) - _entropy(pair_N), 0.0)


def _entropy(values_N: np.ndarray) -> float:
    """Returns H = -sum of p log2 p, in bits."""
    _, counts = np.unique(values_N, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def typical(record: Record, most: int = 6) -> list[list[list[tuple[int, float, int]]]]:
    """Returns by layer and expert the tokens that go to it most often for their frequency.

    A token is (id, lift, count): the lift is p(expert | token) / p(expert) of first choices, and
    the count how often the token goes there. Tokens that occur less than LEAST_COUNT times are
    left out.
    """
    ids, index_N, count_V = np.unique(record.token, return_inverse=True, return_counts=True)
    is_frequent_V = count_V >= LEAST_COUNT
    layers = []
    for expert_NK in record.expert:
        # How often each token has each expert as its first choice.
        pairs_VE = np.zeros((len(ids), record.num_experts + 1))
        np.add.at(pairs_VE, (index_N, expert_NK[:, 0]), 1)
        # p(expert | token) / p(expert).
        share_E = pairs_VE.sum(0) / max(pairs_VE.sum(), 1)
        conditional_VE = pairs_VE / count_V[:, None]
        lift_VE = conditional_VE / np.where(share_E > 0, share_E, 1)
        of_layer = []
        for expert in range(record.num_experts):
            lift_V, pairs_V = lift_VE[:, expert], pairs_VE[:, expert]
            # A token that came there by chance alone has a small count: it stands behind.
            score_V = np.where(is_frequent_V, lift_V * np.sqrt(pairs_V), 0)
            best = np.argsort(-score_V, kind="stable")[:most]
            kept = [v for v in best if score_V[v] > 0]
            of_layer.append([(int(ids[v]), float(lift_V[v]), int(pairs_V[v])) for v in kept])
        layers.append(of_layer)
    return layers


def transitions(record: Record) -> np.ndarray:
    """Returns [L - 1, E, E]: of the tokens whose first choice is i, the share that has j in the
    next layer.
    """
    num_experts = record.num_experts
    first_LN = record.expert[:, :, 0]
    shares = []
    for here_N, next_N in itertools.pairwise(first_LN):
        # Without the tokens that go nowhere in either layer.
        pairs_EE = _pairs(here_N, next_N, num_experts)
        num_here_E1 = pairs_EE.sum(1, keepdims=True)
        shares.append(pairs_EE / np.maximum(num_here_E1, 1))
    # A model of one layer has no transitions, and still E.
    return np.array(shares).reshape(-1, num_experts, num_experts)


def paths(record: Record, most: int = 12) -> list[tuple[list[int], float, float]]:
    """Returns the most frequent paths of first choices through all layers.

    A path is (experts, its share of the tokens, the share if layers chose independently).
    """
    first_NL = record.expert[:, :, 0].T
    unique, counts = np.unique(first_NL, axis=0, return_counts=True)
    num_tokens = len(first_NL)
    # The share of the tokens that each expert of a layer has.
    shares = [np.bincount(z, minlength=record.num_experts + 1) / num_tokens for z in first_NL.T]
    found = []
    for i in np.argsort(-counts, kind="stable")[:most]:
        experts = [int(expert) for expert in unique[i]]
        of_layers = [share[expert] for share, expert in zip(shares, experts, strict=True)]
        # Layers that chose independently would multiply.
        expected = float(np.prod(of_layers))
        found.append((experts, float(counts[i] / num_tokens), expected))
    return found


class Match(NamedTuple):
    """The experts of two runs, matched layer by layer.

    Fields:
      partner: [L, E], the expert of the other run that each expert of the first is matched with.
      overlap: [L, E, E], tokens that both have over tokens that one of them has, in the order of
        `partner`.
      agreement: [L], the share of first choices that agree after the matching.
      chance: [L], the same when the other run's tokens are dealt out anew and matched again.
    """

    partner: np.ndarray
    overlap: np.ndarray
    agreement: np.ndarray
    chance: np.ndarray


def match(first: Record, other: Record, seed: int = 0) -> Match:
    """Matches the experts of two runs that read the same tokens, by what goes to them.

    The matching is the assignment that makes the most first choices agree.
    """
    rng = np.random.default_rng(seed)
    num_experts = first.num_experts
    partners, overlaps, agreements, chances = [], [], [], []
    for a_N, b_N in zip(first.expert[:, :, 0], other.expert[:, :, 0], strict=True):
        pairs_EE = _pairs(a_N, b_N, num_experts)
        partner_E = _assign(pairs_EE)
        partners.append(partner_E)
        agreements.append(_agreement(pairs_EE, partner_E, len(a_N)))
        # Tokens of both over tokens of either.
        own_E1 = pairs_EE.sum(1, keepdims=True)
        other_1E = pairs_EE.sum(0, keepdims=True)
        either_EE = own_E1 + other_1E - pairs_EE
        overlap_EE = pairs_EE / np.maximum(either_EE, 1)
        overlaps.append(overlap_EE[:, partner_E])
        # A matching finds some agreement in any two runs: so much.
        shuffled_EE = _pairs(a_N, rng.permutation(b_N), num_experts)
        by_chance_E = _assign(shuffled_EE)
        chances.append(_agreement(shuffled_EE, by_chance_E, len(a_N)))
    return Match(
        partner=np.array(partners),
        overlap=np.array(overlaps),
        agreement=np.array(agreements),
        chance=np.array(chances),
    )


def _agreement(pairs_EE: np.ndarray, partner_E: np.ndarray, num_tokens: int) -> float:
    """Returns the share of tokens whose experts are each other's partners."""
    experts = np.arange(len(partner_E))
    return pairs_EE[experts, partner_E].sum() / num_tokens


def _pairs(a_N: np.ndarray, b_N: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns [E, E]: how many tokens have expert i in one list and j in the other."""
    counts = np.zeros((num_experts + 1, num_experts + 1))
    np.add.at(counts, (a_N, b_N), 1)
    return counts[:num_experts, :num_experts]


def _assign(counts_EE: np.ndarray) -> np.ndarray:
    """Returns [E]: a partner for each expert, all different, with the most tokens in common."""
    # Imported here: training imports this package's neighbours, and scipy takes a second.
    from scipy.optimize import linear_sum_assignment

    # It looks for the least sum.
    _, partner_E = linear_sum_assignment(-counts_EE)
    return partner_E
