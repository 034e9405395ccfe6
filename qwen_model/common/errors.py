"""The one exception for what a user can put right: bad input, a wrong file, a limit that is too small."""


class QwenModelError(ValueError):
    """The message says what was given, what was expected and, where there is one, what to do about it."""
