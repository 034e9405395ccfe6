"""Define the errors of the API, in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

RETRY_AFTER = 1  # seconds


class ApiError(Exception):
    """Say what is wrong with a request, or with the server.

    status: of HTTP. param: the field that is wrong. kind: OpenAI's `type`. code: OpenAI's `code`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.kind, self.code = status, message, param, kind, code

    @property
    def body(self) -> dict[str, Any]:
        """Return the error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the status."""
        if self.status == 429:
            return {"Retry-After": str(RETRY_AFTER)}
        return {"WWW-Authenticate": 'Bearer, Basic realm="qwen_model"'} if self.status == 401 else {}
