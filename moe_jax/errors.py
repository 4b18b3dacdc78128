"""The one exception that means: the user can mend this. Its text is all that is shown."""

from typing import ClassVar

from moe_jax import exit_codes


class UserError(ValueError):
    """A mistake in a config, file, checkpoint or flag.

    The message names the key or file, the values and the way out.
    """

    code: ClassVar[int] = exit_codes.CONFIG


class NoCheckpoint(UserError):
    """A workdir has checkpoints, and none of them can be read."""

    code = exit_codes.NO_CHECKPOINT


class Drift(UserError):
    """The processes of one run were not started with the same things."""

    code = exit_codes.DRIFT
