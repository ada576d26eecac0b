"""The OpenAPI document: bodies are parsed by hand, so their schemas are declared by hand too."""

import copy
import functools
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from protocol.problems import CONTENT_TYPE, ProblemDocument

_REFS: Final = "#/components/schemas/{model}"


def reply_of(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: a message, or a problem document."""
    return {
        200: {"content": {"application/json": {"schema": _schema(model)}}},
        "default": {
            "description": "A refusal (RFC 9457).",
            "content": {CONTENT_TYPE: {"schema": _schema(ProblemDocument)}},
        },
    }


def body_of(model: type[BaseModel] | None) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads a message, or raw bytes for None."""
    if model is None:
        schema: dict[str, Any] = {"type": "string", "format": "binary"}
        content = {"application/octet-stream": {"schema": schema}}
    else:
        content = {"application/json": {"schema": _schema(model)}}
    return {"requestBody": {"required": True, "content": content}}


def install_openapi(app: FastAPI) -> None:
    """Make `/openapi.json` whole: the messages' own definitions move to the components."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            definitions: dict[str, Any] = {}
            _lift(document, definitions)
            components = document.setdefault("components", {})
            components["schemas"] = {**components.get("schemas", {}), **definitions}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the documented way to replace it


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    # A copy: the framework and `_lift` both write into what they are given.
    return copy.deepcopy(_generated_schema(model))


@functools.cache
def _generated_schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(ref_template=_REFS, mode="serialization")


def _lift(node: object, definitions: dict[str, Any]) -> None:
    if isinstance(node, dict):
        inner = node.pop("$defs", None)
        if isinstance(inner, dict):
            _lift(inner, definitions)
            definitions.update(inner)
        for value in node.values():
            _lift(value, definitions)
    elif isinstance(node, list):
        for value in node:
            _lift(value, definitions)
