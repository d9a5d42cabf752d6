"""What users see as a single line: the error that ends the work, and the notice that does not."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message says what was got, what was expected and what to do; the command line prints it as one line and exits with code 2.
    """


class Notice(UserWarning):
    """Something that was given is ignored, or used differently than asked; the work goes on.

    Issued as a Python warning, so that programs can filter it; the command line prints it as one line that begins with "warning:".
    """
