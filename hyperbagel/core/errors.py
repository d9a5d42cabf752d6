"""What is shown to users as a single line: the error that ends the work, and the notice that does not."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message says what was got, what was expected and what to do; the command line prints it as one line and exits with code 2.
    """


class Notice(UserWarning):
    """Something that was given is used in another way than it says, or not at all; the work goes on.

    Raised as a Python warning, so that programs can filter it; the command line prints it as one line that begins with "warning:".
    """
