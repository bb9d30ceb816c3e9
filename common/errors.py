"""The error classes for what a user can mend, and for what time may; other errors in one line."""


def first_line(error: BaseException) -> str:
    """Of its message; its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class UserError(ValueError):
    """Bad input or a missing piece: its text is one line that says what is wrong and what helps.

    A program that it ends has exit status 2: the same command would end in the same way again.
    """

    status = 2


class ShortageError(UserError):
    """Memory or disk is lacking now: the same command may work later. Its exit status is 1."""

    status = 1
