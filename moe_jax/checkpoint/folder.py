"""The directory of checkpoints: which there are, and the safe ways to remove one.

    step_00000500/               a checkpoint, once it has a manifest
    step_00000500.unfinished     that step is being written or deleted by us. Without a manifest it
                                 is a ruin that the next save may sweep away; nothing else is ours
    step_00000500.damaged0/      set aside, because it was damaged
    step_00000500.old0           set aside, because a save needs the name

All of it is done by process 0.
"""

import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from moe_jax.checkpoint import manifest
from moe_jax.errors import UserError

UNFINISHED = ".unfinished"
# What Orbax appends to the name of a step while it writes.
ORBAX_PART = ".orbax-checkpoint-tmp"

log = logging.getLogger(__name__)


def step_path(directory: Path, step: int) -> Path:
    """Returns where the checkpoint of a step is, or would be."""
    return directory / manifest.step_name(step)


def committed_steps(directory: Path) -> list[int]:
    """Returns the steps whose directory has a manifest, in order; it may be damaged.

    Raises UserError when the directory is there and cannot be listed.
    """
    steps = []
    for name in _names(directory):
        step = _step_of(name)
        if step is not None and has_manifest(directory / name):
            steps.append(step)
    return sorted(steps)


def has_manifest(path: Path) -> bool:
    """Returns whether there is a manifest; one that cannot be looked at counts: it is damage."""
    # lstat, so that a link to a manifest that is gone counts too: damage, and no ruin of ours.
    try:
        os.lstat(path / manifest.MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def set_aside(path: Path, why: str) -> Path | None:
    """Renames what is at `path`, a link itself, to the next free PATH.`why`N, and returns that.

    Returns None when there is nothing.
    """
    if not os.path.lexists(path):
        return None
    candidates = (path.parent / f"{path.name}.{why}{number}" for number in itertools.count())
    aside = next(candidate for candidate in candidates if not os.path.lexists(candidate))
    # A rename keeps the files, in case somebody can still make use of them.
    path.rename(aside)
    return aside


def begin_save(directory: Path, step: int, damaged: Iterable[int]) -> None:
    """Makes room for a checkpoint of `step`, which will be the newest.

    Sets aside the `damaged` steps, what is in the way, and every later checkpoint: it is of another
    history of the run, and the next start would take it for the newest.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # First what an earlier kill left, so that nothing of it is in the way.
    sweep(directory)
    for damaged_step in damaged:
        set_aside(step_path(directory, damaged_step), "damaged")
    path = step_path(directory, step)
    # Renames only: a kill here leaves every checkpoint whole, some under other names.
    later = [step_path(directory, s) for s in committed_steps(directory) if s > step]
    for in_the_way in [*later, path, *_parts(path)]:
        if aside := set_aside(in_the_way, "old"):
            log.warning("%s was in the way of step %d: it is %s now", in_the_way, step, aside.name)
    # Last, and before Orbax makes the directory: what it leaves half-written is known to be ours,
    # and what was in the way, which is not ours, is never taken for it.
    _mark(path)


def end_save(directory: Path, step: int) -> None:
    """Takes the marker away from a checkpoint that is committed.

    A kill before that does no harm: `sweep` leaves what has a manifest alone.
    """
    _marker(step_path(directory, step)).unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Deletes what killed runs of ours left half-written or half-deleted, and nothing else.

    Only while nothing is being saved.
    """
    for name in _names(directory):
        if not name.endswith(UNFINISHED):
            continue
        step = _step_of(name.removesuffix(UNFINISHED))
        if step is None:
            continue
        path = step_path(directory, step)
        # With a manifest it is a checkpoint: killed after its commit, or before its deletion.
        if not has_manifest(path):
            for ruin in [path, *_parts(path)]:
                _delete(ruin)
        # Last: killed before it, the marker still says whose ruin it is.
        _marker(path).unlink()


def marked(directory: Path) -> list[Path]:
    """Returns what `sweep` would delete: ruins that have a mark of ours beside them."""
    names = [name for name in _names(directory) if name.endswith(UNFINISHED)]
    steps = [_step_of(name.removesuffix(UNFINISHED)) for name in names]
    paths = [step_path(directory, step) for step in steps if step is not None]
    ruins = [path for path in paths if not has_manifest(path)]
    return [part for path in ruins for part in [path, *_parts(path)]]


def prune(
    directory: Path, keep: int, keep_best: int, sound: set[int], damage_of: Callable[[Path], str]
) -> None:
    """Deletes all checkpoints but the last `keep` and the `keep_best` with the lowest scores.

    Only sound ones are counted: one that is not yet in `sound` is verified by `damage_of`, and then
    added to it or set aside. A checkpoint that cannot be deleted stays, with a warning.
    """

    def first_sound(steps: list[int], number: int) -> list[int]:
        return _first_sound(directory, steps, number, sound, damage_of)

    # Damaged ones are among them: they are told apart below.
    steps = committed_steps(directory)
    # So few are all kept: nothing has to be read for a digest.
    if len(steps) <= keep:
        return
    scores = _scores(directory, steps)
    # The lowest first; of equal scores the earlier step.
    by_score = sorted((score, step) for step, score in scores.items() if score is not None)
    # Sound ones are found before anything is deleted: a damaged one must not take the place of the
    # last that a run can go on from.
    last = first_sound(sorted(scores, reverse=True), keep)
    best = first_sound([step for _, step in by_score], keep_best)
    for step in scores:
        path = step_path(directory, step)
        # It has no manifest here if it was found damaged meanwhile and set aside.
        if step not in {*last, *best} and has_manifest(path):
            try:
                # What is newer and better is whole: this one may go.
                remove(path)
            except OSError as error:
                log.warning("the old checkpoint %s stays, it cannot be deleted: %s", path, error)


def remove(path: Path) -> None:
    """Deletes a checkpoint; of a link to one, the link.

    The manifest goes before the files: killed half-way, what is left is no checkpoint any more, and
    the marker, which is there from beginning to end, says that it is ours to sweep.
    """
    # The files behind a link are somebody else's.
    if path.is_symlink():
        path.unlink()
        return
    _mark(path)
    (path / manifest.MANIFEST).unlink()
    shutil.rmtree(path)
    _marker(path).unlink()


def _scores(directory: Path, steps: Iterable[int]) -> dict[int, float | None]:
    """Returns {step: score} of those whose manifest can be read, and sets the others aside."""
    scores: dict[int, float | None] = {}
    for step in steps:
        try:
            scores[step] = manifest.read(step_path(directory, step))["score"]
        except manifest.Damaged as error:
            _set_damaged_aside(step_path(directory, step), str(error))
    return scores


def _first_sound(
    directory: Path,
    steps: list[int],
    number: int,
    sound: set[int],
    damage_of: Callable[[Path], str],
) -> list[int]:
    """Returns the first `number` sound `steps`; damaged ones before them are set aside."""
    first: list[int] = []
    for step in steps:
        # Files are read for a digest only as far as is needed.
        if len(first) == number:
            break
        path = step_path(directory, step)
        if step not in sound and has_manifest(path):
            damage = damage_of(path)
            if damage:
                _set_damaged_aside(path, damage)
            else:
                sound.add(step)
        if step in sound:
            first.append(step)
    return first


def _set_damaged_aside(path: Path, damage: str) -> None:
    aside = set_aside(path, "damaged")
    new_name = aside and aside.name
    log.warning("the checkpoint %s is damaged (%s): it is %s now", path, damage, new_name)


def _names(directory: Path) -> list[str]:
    """Returns the names in a directory, sorted; none where it is not there."""
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{directory} holds no checkpoints that can be listed: {error.strerror}"
        ) from None


def _step_of(name: str) -> int | None:
    """Returns the step of a directory's name, None of any other name (`step_²`, `step_7`)."""
    match = re.fullmatch(manifest.PREFIX + "([0-9]+)", name)
    if not match:
        return None
    step = int(match[1])
    # A number has one name: without its zeros, or with too many, it is not ours.
    return step if name == manifest.step_name(step) else None


def _parts(path: Path) -> list[Path]:
    """Returns what there is of a checkpoint under the names that Orbax gives it while it writes."""
    names = _names(path.parent)
    return [path.parent / name for name in names if name.startswith(path.name + ORBAX_PART)]


def _marker(path: Path) -> Path:
    """Returns where the marker of a checkpoint is; beside it, so that Orbax does not see it."""
    return path.parent / (path.name + UNFINISHED)


def _mark(path: Path) -> None:
    text = (
        f"{path.name} is being written or deleted. Without {manifest.MANIFEST} in it, it is a ruin."
    )
    _marker(path).write_text(text + "\n", encoding="utf-8")


def _delete(path: Path) -> None:
    """Deletes a directory, a file or a link; nothing when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
