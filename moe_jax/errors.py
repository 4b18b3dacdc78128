"""The one exception that means: the user can mend this. Its text is all that is shown."""


class UserError(ValueError):
    """A mistake in a config, file, checkpoint or flag.

    The message names the key or file, the values and the way out.
    """
