"""The error classes for what a user can mend, and for what time may."""


class UserError(ValueError):
    """Bad input or a missing piece: its text is one line that says what is wrong and what helps.

    A program that it ends has exit status 2: the same command would end in the same way again.
    """

    status = 2


class ShortageError(UserError):
    """Memory or disk is lacking now: the same command may work later. Its exit status is 1."""

    status = 1
