"""The one exception that is shown to users as a single line."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message says what was got, what was expected and what to do; the command line prints it as one line and exits with code 2.
    """
