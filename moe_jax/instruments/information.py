"""How much the choice of an expert tells about the domain of a token: mutual information, its
ceiling, and what chance gives.

Every domain that has assignments weighs the same, so that a large domain does not decide the
figures.

Shapes: L MoE layers, Z domains, E experts, R held-out rows; "..." stands for any dimensions in
front.
"""

import numpy as np

SHUFFLES = 100
QUANTILE = 0.95


def mutual_information(counts_ZE: np.ndarray) -> np.ndarray:
    """Returns I(domain; expert) in bits, at least 0, from counts of assignments [..., Z, E].

    It is 0 where all domains use the experts alike, and log2(n) with an expert for each of n
    domains.
    """
    conditional_ZE, weight_Z1 = _conditional(counts_ZE)
    mean_1E = (weight_Z1 * conditional_ZE).sum(-2, keepdims=True)
    used_ZE = conditional_ZE > 0
    ratio_ZE = np.where(used_ZE, conditional_ZE, 1) / np.where(used_ZE, mean_1E, 1)
    return np.maximum((weight_Z1 * conditional_ZE * np.log2(ratio_ZE)).sum((-2, -1)), 0)


def ceiling(counts_ZE: np.ndarray) -> np.ndarray:
    """Returns the most that the mutual information could be, in bits: the smaller of the entropies
    of domain and expert.
    """
    conditional_ZE, weight_Z1 = _conditional(counts_ZE)
    mean_E = (weight_Z1 * conditional_ZE).sum(-2)
    return np.minimum(_entropy(weight_Z1[..., 0]), _entropy(mean_E))


def chance(
    experts_RLE: np.ndarray, domain_R: np.ndarray, num_domains: int, seed: int
) -> np.ndarray:
    """Returns [L]: the mutual information below which 95 % of shuffles stay, when rows keep their
    routing but swap their domains.

    Few rows give mutual information even where domains do not matter: a value below this one shows
    nothing. Rows of one document are alike, so chance reaches somewhat further than this.
    """
    rows, layers, num_experts = experts_RLE.shape
    there = experts_RLE.reshape(rows, -1).sum(1) > 0
    counts_RX, domain_R = experts_RLE[there].reshape(there.sum(), -1), domain_R[there]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(SHUFFLES):
        one_hot_ZR = np.arange(num_domains)[:, None] == rng.permutation(domain_R)
        counts_ZX = one_hot_ZR.astype(np.float32) @ counts_RX.astype(np.float32)
        counts_LZE = counts_ZX.reshape(num_domains, layers, num_experts).swapaxes(0, 1)
        found.append(mutual_information(counts_LZE.astype(np.float64)))
    return np.quantile(found, QUANTILE, axis=0)


def origin(counts_ZE: np.ndarray) -> np.ndarray:
    """Returns [..., Z, E]: the share of an expert's assignments that come from each domain, if all
    domains had equally many.

    The shares add up to 1 over domains. They are NaN for an expert without assignments, and for a
    domain without any.
    """
    conditional_ZE, _ = _conditional(counts_ZE)
    sum_1E = conditional_ZE.sum(-2, keepdims=True)
    there_ZE = (sum_1E > 0) & (counts_ZE.sum(-1, keepdims=True) > 0)
    return np.where(there_ZE, conditional_ZE / np.where(sum_1E > 0, sum_1E, 1), np.nan)


def _conditional(counts_ZE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns p(expert | domain) [..., Z, E] and the weight of each domain [..., Z, 1]: equal for
    those that have assignments, 0 for others.
    """
    sum_Z1 = counts_ZE.sum(-1, keepdims=True)
    there_Z1 = sum_Z1 > 0
    weight_Z1 = there_Z1 / np.maximum(there_Z1.sum(-2, keepdims=True), 1)
    return counts_ZE / np.where(there_Z1, sum_Z1, 1), weight_Z1


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)
