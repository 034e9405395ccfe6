"""Define the exception for what a user can put right: bad input, a wrong file, a limit that is too small."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 6
_SHORT.maxlevel = 3


class QwenModelError(ValueError):
    """Say in one line what was given, what was expected and, if possible, what to do.

    TensorRT's own messages follow on further lines.
    """


class OutOfMemoryError(QwenModelError):
    """Say that a device's memory does not suffice; a smaller batch or smaller limits may."""


def shown(value: object) -> str:
    """Return the `repr` of a value that a user gave, cut to fit into a message of one line."""
    return _SHORT.repr(value)
