"""The relative position bias of T5: a learned number of each head, by the distance of two tokens,
that is added to their score (Raffel et al. 2019, arXiv:1910.10683, section 2.1).

A distance is the place of a key less that of its query. Distances share buckets: half of the
buckets have one short distance each, the others ranges that grow as a logarithm up to
`max_distance`, and the last one all that is further. Where a query sees later keys, these have half
of all buckets. Tokens of a segment stand side by side, so that places in a row and positions in a
segment are as far apart.

A kernel adds the number of each score's bucket, and sums the gradients of scores by buckets: a
product with a matrix of zeros and ones, for a scatter of so many numbers into so few is slow, and
on a GPU in no certain order.

Shapes: see attention_core.py; L buckets, X = r L, C queries of a block.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moe_jax.models.attention_layout import Reach
from moe_jax.parallel import context
from moe_jax.precision import wide_dtype

# The name of the numbers [L, H] among the weights that the blocks of a stack share.
TABLE = "relative_bias"


class Buckets(NamedTuple):
    """How distances share buckets."""

    number: int
    # From here on all keys have the last bucket.
    max_distance: int
    # Later keys have buckets of their own.
    both_ways: bool

    @property
    def exact(self) -> int:
        """The number of distances of one direction that have a bucket of their own."""
        return self.number // (4 if self.both_ways else 2)

    def of_distances(self) -> np.ndarray:
        """Returns the bucket of each distance from -max_distance to max_distance, int32; what is
        further has that of the ends.
        """
        distance = np.arange(-self.max_distance, self.max_distance + 1)
        if self.both_ways:
            each = self.number // 2
            later = np.where(distance > 0, each, 0).astype(np.int32)
            return later + self._one_way(np.abs(distance), each)
        return self._one_way(np.maximum(-distance, 0), self.number)

    def _one_way(self, distance: np.ndarray, number: int) -> np.ndarray:
        """Returns the bucket of each distance, of `number` buckets of one direction."""
        # In float32, as T5 was trained: in float64 a distance at an edge may have another bucket.
        ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(self.exact)
        octaves = np.log(ratio) / np.float32(math.log(self.max_distance / self.exact))
        far = self.exact + (octaves * np.float32(number - self.exact)).astype(np.int32)
        bucket = np.where(distance < self.exact, distance, np.minimum(far, number - 1))
        return bucket.astype(np.int32)

    def of(self, distance: Array) -> Array:
        """Returns the buckets of distances, int32."""
        within = jnp.clip(distance, -self.max_distance, self.max_distance)
        return jnp.asarray(self.of_distances())[within + self.max_distance]


class Bias(NamedTuple):
    """The bias as a kernel adds it."""

    # Of each query head, those of a key head side by side.
    number_NX: Array
    buckets: Buckets
    # Queries of a token that share a key head.
    r: int
    # Where in its row each token stands that has queries.
    place_T: Array

    def bucket(self, first: Any, number: int, key_K: Array) -> Array:
        """Returns the bucket of each of `number` queries from `first` on, and key, [C, K]."""
        query_C = first + jnp.arange(number, dtype=jnp.int32)
        # A chunk may have queries behind the last one, which see nothing.
        place_C = self.place_T.at[query_C // self.r].get(mode="clip")
        return self.buckets.of(key_K[None] - place_C[:, None])

    def added(self, bucket_CK: Array, first: int) -> Array:
        """Returns what is added to scores [N, C, K]; `first`: of the queries, or it less a multiple
        of r.
        """
        head_C = (first + jnp.arange(bucket_CK.shape[0], dtype=jnp.int32)) % self.r
        index_CK = head_C[:, None] * self.buckets.number + bucket_CK
        return jnp.take(self.number_NX, index_CK, axis=1)

    def gradient(self, dscore: Array, bucket: Array, first: int, axis: int) -> Array:
        """Returns the gradient of `number_NX`, of those of scores.

        Args:
          dscore, bucket: [N, C, K] and [C, K], or [N, K, C] and [K, C].
          first: as `added` has it.
          axis: that of the queries in `bucket`.
        """
        of_heads = []
        for head in range(self.r):
            own = (head - first) % self.r
            bucket_own = lax.slice_in_dim(bucket, own, None, self.r, axis)
            dscore_own = lax.slice_in_dim(dscore, own, None, self.r, axis + 1)
            is_in = jax.nn.one_hot(bucket_own, self.buckets.number, dtype=dscore.dtype)
            precise = lax.Precision.HIGHEST
            of_heads.append(jnp.einsum("Nab,abL->NL", dscore_own, is_in, precision=precise))
        return jnp.concatenate(of_heads, axis=1)


def of_kernel(
    buckets: Buckets | None, number_BHL: Any, reach: Reach, num_tokens: int, G: int
) -> Bias | None:
    """Returns the bias as kernels add it, of the numbers of each row; None where there is none."""
    if buckets is None:
        return None
    B, H, _ = number_BHL.shape
    wide = wide_dtype(number_BHL.dtype)
    number_NX = number_BHL.astype(wide).reshape(B * G, -1)
    if reach.shards == 1:
        place_T = jnp.arange(num_tokens, dtype=jnp.int32)
    else:
        places_nT = jnp.asarray(context.places(reach.shards, num_tokens * reach.shards))
        device = lax.axis_index(context.AXIS)
        place_T = lax.dynamic_index_in_dim(places_nT, device, keepdims=False)
    return Bias(number_NX, buckets, H // G, place_T)


def of_slots(table_LH: Array, buckets: Buckets, position_BS: Array, num_slots: int) -> Array:
    """Returns what is added to the scores of tokens at positions and the slots of a cache,
    [B, H, S, M].
    """
    slot_11M = jnp.arange(num_slots, dtype=position_BS.dtype)[None, None]
    bucket_BSM = buckets.of(slot_11M - position_BS[:, :, None])
    number_BSMH = table_LH.astype(wide_dtype(table_LH.dtype))[bucket_BSM]
    return jnp.moveaxis(number_BSMH, 3, 1)
