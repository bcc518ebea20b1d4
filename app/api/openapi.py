"""The OpenAPI document: FastAPI derives it, and this module adds what FastAPI cannot know of this service.

Every error is a problem, uploads are forms that are parsed as they stream, and a key may be needed.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from app import schemas
from app.settings import Settings

_REFERENCES = "#/components/schemas/{model}"
_SPECS = (schemas.CheckpointSpec, schemas.ProbeSpec, schemas.FeatureSetSpec)
# FastAPI's own schemas, which no answer of ours uses.
_UNUSED = ("HTTPValidationError", "ValidationError")


def reference(model: type[BaseModel]) -> dict[str, Any]:
    """Return a reference to a schema that the document lists once."""
    return {"$ref": _REFERENCES.format(model=model.__name__)}


def problem_response() -> dict[str, Any]:
    """Return the entry of an error in a route's responses."""
    content = {"application/problem+json": {"schema": reference(schemas.Problem)}}
    return {"description": "A problem, see docs/problems.md", "content": content}


class Application(FastAPI):
    """FastAPI with a document that also describes errors, uploads and the key."""

    settings: Settings

    def openapi(self) -> dict[str, Any]:
        """Return the document; it is built once."""
        if self.openapi_schema is None:
            document = super().openapi()
            components = document["components"]
            for model in (schemas.Problem, *_SPECS):
                schema = model.model_json_schema(ref_template=_REFERENCES)
                for name, nested in schema.pop("$defs", {}).items():
                    components["schemas"].setdefault(name, nested)
                components["schemas"][model.__name__] = schema
            for name in _UNUSED:
                components["schemas"].pop(name, None)
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            needs_key = self.settings.api_key is not None
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    if path.startswith("/v1/"):
                        # If no key is set, none is checked.
                        operation["security"] = [{"key": []}] if needs_key else [{}, {"key": []}]
                    for status in _errors(path, operation, needs_key=needs_key):
                        if status == 422 or str(status) not in operation["responses"]:
                            operation["responses"][str(status)] = problem_response()
        assert self.openapi_schema is not None
        return self.openapi_schema


def _errors(path: str, operation: dict[str, Any], *, needs_key: bool) -> list[int]:
    """Return the error statuses that any operation of its kind may answer, beside those of its own route."""
    if path == "/healthz":
        return [] if needs_key else [403]
    found = [500] if path == "/readyz" else [500, 503]
    if not needs_key:
        found.append(403)
    elif path.startswith("/v1/"):
        found.append(401)
    if operation.get("parameters") or "requestBody" in operation:
        found.append(422)
    if "requestBody" in operation:
        found += [408, 413]
    return found
