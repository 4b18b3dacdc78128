"""Checkpoints: atomic, verified, readable on another mesh and by a model with or without scan.

    step_00000500/moe_jax.json    written last: the commit marker. Step, score, metadata (the
                                  config), the shape and dtype of every array, the size and SHA-256
                                  of every file, and a SHA-256 of the manifest itself
    step_00000500/state/          the arrays, by Orbax, under flat names: "params/embed"
    step_00000500.unfinished      there while that step is being written or deleted
    step_00000500.damaged0/       a damaged checkpoint that was set aside; nobody reads it

A directory without a manifest is not a checkpoint. It is swept away by the next save if we were
writing or deleting it (`.unfinished`), and otherwise left alone: it is somebody else's. Files are
checked against the manifest before a run resumes from them (Orbax has no checksum: a flipped bit
would be restored silently). A damaged checkpoint is passed over, and renamed by the next save; it
never counts as one of the last.

A save and a deletion go in the order of this table. A kill after a step leaves behind:

    saving     marker written      a marker alone, which the next save removes
               arrays written      arrays and the marker, no manifest: a ruin, swept
               manifest written    a checkpoint, and the marker, which the next save removes
               marker removed      a checkpoint, and perhaps old ones too many
    deleting   marker written      a checkpoint, still whole, and the marker
               manifest removed    files and the marker, no manifest: a ruin, swept
               files removed       a marker alone
               marker removed      nothing

So every directory that has a manifest is whole at any time. The manifest is written once the arrays
are found where a restore looks for them. Old checkpoints are deleted last, when the new one counts.

Several processes share the reading of files for digests, after a save and before a restore
(together.py). Process 0 alone lists, renames, writes and deletes.
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
