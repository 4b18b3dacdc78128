"""Checkpoints: atomic, verified, readable on another mesh and by a model with or without scan.

    step_00000500/moe_jax.json    written last: the commit marker. Step, score, metadata (the config), the shape and
                                  dtype of every array, and the size and SHA-256 of every file
    step_00000500/state/          the arrays, by orbax, under flat names: "params/embed", "opt_state/rate/count"

A directory without that manifest is not a checkpoint: it is half-written or half-deleted, and the next save sweeps it
away. Deleting removes the manifest first, so a kill at any time leaves every listed checkpoint whole. Files are checked
against the manifest before a run resumes from them (orbax has no checksum: a flipped bit would be restored silently).
"""

from moe_jax.checkpoint.initial import Report, load_params
from moe_jax.checkpoint.resume import compare_configs, fill
from moe_jax.checkpoint.store import Checkpoints

__all__ = ["Checkpoints", "Report", "compare_configs", "fill", "load_params"]
