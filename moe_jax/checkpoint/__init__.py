"""Checkpoints: atomic, verified, readable on another mesh and by a model with or without scan.

    step_00000500/moe_jax.json    written last: the commit marker. Step, score, metadata (the
                                  config), the shape and dtype of every array, the size and SHA-256
                                  of every file, and a SHA-256 of the manifest itself
    step_00000500/state/          the arrays, by Orbax, under flat names: "params/embed"
    step_00000500.unfinished      there while that step is being written or deleted
    step_00000500.damaged0/       a damaged checkpoint that was set aside; nobody reads it

A directory without a manifest is not a checkpoint. It is swept away by the next save if we were
writing or deleting it (`.unfinished`), and otherwise left alone: it is somebody else's. Deleting
removes the manifest first, so a kill at any time leaves every listed checkpoint whole. The manifest
is written once the arrays are found where a restore looks for them. Files are checked against it
before a run resumes from them (Orbax has no checksum: a flipped bit would be restored silently). A
damaged checkpoint is passed over, and renamed by the next save; it never counts as one of the last.
"""

from moe_jax.checkpoint.initial import Report, load_params, refuse_idle_renames
from moe_jax.checkpoint.resume import allowed_changes, compare_configs, fill, same_data
from moe_jax.checkpoint.store import Checkpoints, SaveFailed

__all__ = [
    "Checkpoints",
    "Report",
    "SaveFailed",
    "allowed_changes",
    "compare_configs",
    "fill",
    "load_params",
    "refuse_idle_renames",
    "same_data",
]
