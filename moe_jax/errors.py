"""The exceptions that mean: the user can mend this. Their text is all that is shown."""


class UserError(ValueError):
    """A mistake in a config, file, checkpoint or flag. The message names the key or file, the values and the way out."""


class SaveError(RuntimeError):
    """A checkpoint could not be written. The message names it and the reason; those that were written before stay."""
