"""The one exception type of xelm that is not built in, and what others say.

`experts` and `xelm` import it from here, because imports point this way. It knows nothing about how
it is shown: the command line prints its message as one line and exits with code 2.
"""


class UserError(Exception):
    """A mistake that the user can correct; names the thing, what it must be and what it is."""


def first_line(error: BaseException) -> str:
    """First line of an error's message; the name of its type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
