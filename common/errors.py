"""The one error class for what a user can mend."""


class UserError(ValueError):
    """Bad input or a missing piece: its text is one line that says what is wrong and what helps."""
