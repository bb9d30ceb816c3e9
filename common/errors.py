"""The one error class for what a user can mend."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input or a missing piece: its text is one line that says what is wrong and what helps."""


def run_cli(main: Callable[[], None]) -> None:
    """Run `main`; a `UserError` ends the process with one line on stderr and status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
