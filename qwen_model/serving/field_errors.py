"""Say in the API's terms which field of a body is wrong, from pydantic's errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from .errors import ApiError

FORMS = {
    "bool": "true or false",
    "str": "a string",
    "list[int]": "a list of integers",
    "list[str]": "a list of strings",
    "list[list[int]]": "a list of lists of integers",
    "dict[str,any]": "an object",
    "list[dict[str,any]]": "a list of objects",
    "NamedTool": 'an object {"type": "function", "function": {"name": ...}}',
}
"""What pydantic's names of a union's members mean."""


def field_error(error: RequestValidationError, content_type: str | None) -> ApiError:
    """Return the error of the first field that is wrong.

    content_type: of the request. A body that does not say that it is JSON is not read as such: a page of another site
    may send any body but one of that type.
    """
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}")
    if isinstance(error.body, bytes) and error.body:
        sent = "none was sent" if content_type is None else f"{content_type!r:.100} was sent"
        return ApiError(400, f"the body needs the header Content-Type: application/json; {sent}")
    located = [{**each, "loc": each["loc"][1:]} for each in errors]  # "body" comes first
    return wrong_value(located, error.body)


def wrong_value(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Return the error of the first value of a body that pydantic's errors name."""
    first = errors[0]
    path, form = _split(first, body)
    param = ".".join(path) or None
    if form is None:
        given = "" if first["type"] == "missing" else f", given: {first.get('input')!r:.100}"
        return ApiError(400, f"{param or 'the body'}: {first['msg']}{given}", param)
    found = [_split(each, body) for each in errors]
    forms = dict.fromkeys(_words(name) for place, name in found if place[: len(path)] == path and name is not None)
    return ApiError(400, f"{param}: expected {' or '.join(forms)}, given: {_at(body, path)!r:.100}", param)


def _split(error: Mapping[str, Any], body: Any) -> tuple[list[str], str | None]:
    """Divide pydantic's location into the field's place in the body, and the first name of a union's member in it."""
    path: list[str] = []
    last = len(error["loc"]) - 1
    for number, place in enumerate(error["loc"]):
        is_there = place in body if isinstance(body, dict) else isinstance(body, list) and isinstance(place, int)
        if place == "[key]":
            break
        if not is_there and (number < last or error["type"] != "missing"):
            return path, str(place)
        path.append(str(place))
        body = body[place] if is_there else None
    return path, None


def _words(name: str) -> str:
    """Return the form that pydantic's name of a union's member means, in words."""
    if name.startswith("literal["):
        return name[len("literal[") : -1].replace(",", ", ")
    return FORMS.get(name, name)


def _at(body: Any, path: list[str]) -> Any:
    for place in path:
        body = body[int(place) if isinstance(body, list) else place]
    return body
