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
    # I = sum over z, e of  p(z) p(e | z) log2(p(e | z) / p(e)),  p(e) = sum over z of p(z) p(e | z)
    conditional_ZE, weight_Z1 = _conditional(counts_ZE)
    joint_ZE = weight_Z1 * conditional_ZE
    marginal_1E = joint_ZE.sum(-2, keepdims=True)
    # 0 log 0 = 0: the ratio of what never occurs is set to 1.
    occurs_ZE = conditional_ZE > 0
    ratio_ZE = np.where(occurs_ZE, conditional_ZE, 1) / np.where(occurs_ZE, marginal_1E, 1)
    bits = (joint_ZE * np.log2(ratio_ZE)).sum((-2, -1))
    # Rounding can leave a little less than 0.
    return np.maximum(bits, 0)


def ceiling(counts_ZE: np.ndarray) -> np.ndarray:
    """Returns the most that the mutual information could be, in bits: the smaller of the entropies
    of domain and expert.
    """
    # I(z; e) = H(z) - H(z | e) = H(e) - H(e | z), and no entropy is below 0.
    conditional_ZE, weight_Z1 = _conditional(counts_ZE)
    marginal_E = (weight_Z1 * conditional_ZE).sum(-2)
    return np.minimum(_entropy(weight_Z1[..., 0]), _entropy(marginal_E))


def chance(
    experts_RLE: np.ndarray, domain_R: np.ndarray, num_domains: int, seed: int
) -> np.ndarray:
    """Returns [L]: the mutual information below which 95 % of shuffles stay, when rows keep their
    routing but swap their domains.

    Few rows give mutual information even where domains do not matter: a value below this one shows
    nothing. Rows of one document are alike, so chance reaches somewhat further than this.
    """
    num_rows, num_layers, num_experts = experts_RLE.shape
    # X = L E, so that one matrix product counts all layers.
    counts_RX = experts_RLE.reshape(num_rows, -1)
    # Rows of padding have no routing to shuffle.
    has_assignments_R = counts_RX.sum(1) > 0
    counts_RX, domain_R = counts_RX[has_assignments_R], domain_R[has_assignments_R]
    # Whole numbers below 2**24 are exact in float32, and its product is the faster one.
    counts_RX = counts_RX.astype(np.float32)
    rng = np.random.default_rng(seed)
    bits_of_shuffles = []
    for _ in range(SHUFFLES):
        # [Z, R] @ [R, X]: the counts of each domain under shuffled labels.
        one_hot_ZR = np.arange(num_domains)[:, None] == rng.permutation(domain_R)
        counts_ZX = one_hot_ZR.astype(np.float32) @ counts_RX
        counts_LZE = counts_ZX.reshape(num_domains, num_layers, num_experts).swapaxes(0, 1)
        bits_of_shuffles.append(mutual_information(counts_LZE.astype(np.float64)))
    return np.quantile(bits_of_shuffles, QUANTILE, axis=0)


def origin(counts_ZE: np.ndarray) -> np.ndarray:
    """Returns [..., Z, E]: the share of an expert's assignments that come from each domain, if all
    domains had equally many.

    The shares add up to 1 over domains. They are NaN for an expert without assignments, and for a
    domain without any.
    """
    # Bayes with equal p(z):  p(z | e) = p(e | z) / sum over domains of p(e | z)
    conditional_ZE, _ = _conditional(counts_ZE)
    sum_1E = conditional_ZE.sum(-2, keepdims=True)
    share_ZE = conditional_ZE / np.where(sum_1E > 0, sum_1E, 1)
    known_ZE = (sum_1E > 0) & (counts_ZE.sum(-1, keepdims=True) > 0)
    return np.where(known_ZE, share_ZE, np.nan)


def _conditional(counts_ZE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns p(expert | domain) [..., Z, E] and the weight of each domain [..., Z, 1]: equal for
    those that have assignments, 0 for others.
    """
    sum_Z1 = counts_ZE.sum(-1, keepdims=True)
    present_Z1 = sum_Z1 > 0
    num_present_11 = present_Z1.sum(-2, keepdims=True)
    weight_Z1 = present_Z1 / np.maximum(num_present_11, 1)
    return counts_ZE / np.where(present_Z1, sum_Z1, 1), weight_Z1


def _entropy(p: np.ndarray) -> np.ndarray:
    """Returns -sum of p log2 p over the last dimension, in bits; 0 log 0 = 0."""
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)
