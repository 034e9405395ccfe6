"""Has the one exception for what a user can put right: bad input, a wrong file, a limit that is too small."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 6
_SHORT.maxlevel = 3


class QwenModelError(ValueError):
    """The message says what was given, what was expected and, where there is one, what to do about it."""


def shown(value: object) -> str:
    """Return the `repr` of something that a user gave, cut to a length that fits into a message of one line."""
    return _SHORT.repr(value)
