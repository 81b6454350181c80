"""What ``fastvit`` does on the command line: a file a command, and what they share."""


class CannotLoad(Exception):  # noqa: N818
    """The model cannot be loaded; the message is for the user."""
