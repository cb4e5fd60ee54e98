"""What the OpenAPI document says where FastAPI cannot see it: refusals, and bodies read by hand.

Bodies are read by hand where clients send more than the API names, or the same under several names.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_REASONS = {
    400: "The body cannot be read, or what it asks for cannot be drawn.",
    401: "The key is missing or wrong.",
    403: "A host or a page that is not let in.",
    404: "There is no such thing.",
    408: "The rest of the body did not come.",
    409: "The job was cancelled.",
    413: "The body is too large.",
    422: "A field is missing or out of its range.",
    429: "The queue is full; Retry-After says when to ask again.",
    500: "The server failed, or could not draw it; its log says more.",
    503: "The server shuts down.",
    504: "The job was not done by its deadline.",
}

_ALWAYS = (400, 401, 403, 404, 408, 413, 500)
"""What any address may answer, the gate's refusals among them."""

DRAWING = (409, 429, 503, 504)
"""What addresses that queue a job, and wait for it, may answer too."""


class RefusalReason(BaseModel):
    """Why a request was refused. `code` is a word for programs, `param` the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(BaseModel):
    """The body of every refusal but those of A1111's API."""

    error: RefusalReason
    request_id: str | None = None


class A1111Refusal(BaseModel):
    """The body of the refusals of A1111's API."""

    error: str
    detail: str
    body: str
    errors: str
    request_id: str | None = None


Responses = dict[int | str, dict[str, Any]]
"""Answers by status, as FastAPI takes them."""


def refusals(*statuses: int, shape: type[BaseModel] = Refusal) -> Responses:
    """Return the refusals that any address may answer with, and those of some more statuses."""
    return {
        status: {"model": shape, "description": _REASONS[status]}
        for status in sorted({*_ALWAYS, *statuses})
    }


def json_body(kind: type[BaseModel]) -> dict[str, Any]:
    """Return what the document says of a route that reads JSON by hand; it may also have more."""
    return _body("application/json", _whole_schema(kind))


def form_body(kind: type[BaseModel], files: dict[str, Any]) -> dict[str, Any]:
    """Return the same of a route that reads a form: the fields of a body, and files by their names.

    The first of the files is required.
    """
    schema = _whole_schema(kind)
    schema["properties"] |= files
    schema["required"] = [*schema.get("required", ()), next(iter(files))]
    return _body("multipart/form-data", schema)


def _whole_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a body with those of its parts in their places.

    A reference would be looked up in the document, where they are not.
    """
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return whole(parts[value["$ref"].rpartition("/")[2]])
        return {key: whole(each) for key, each in value.items()}

    answer: dict[str, Any] = whole(schema)
    return answer


def _body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}
