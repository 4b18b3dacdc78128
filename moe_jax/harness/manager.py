"""Which tasks the harness knows."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from lm_eval.tasks import TaskManager

from moe_jax.errors import UserError


def manager_for(names: Sequence[str], include: Path | None) -> TaskManager:
    """Returns what finds tasks by their names: in a folder of YAML files, or among the harness's
    own. Raises UserError for a name that neither has.
    """
    folder = str(include) if include else None
    manager = TaskManager(include_path=folder, include_defaults=False)
    # To list the harness's own takes many seconds.
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"--tasks {name}: the harness has no such task{hint}")
    return manager
