"""The one exception that users are meant to read."""


class UserError(ValueError):
    """Something that the user can mend: the message is one line that names the field, or the file and line, to change.

    The launchers print it without a traceback and exit with status 2.
    """
