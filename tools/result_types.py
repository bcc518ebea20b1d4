"""Write the service's answers as the TypedDicts of interplay/results.py: `python -m tools.result_types`.

They are generated from the models that the OpenAPI document names, so that a test can detect drift in either.
"""

import keyword
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.main import create_app
from app.schemas import reports
from app.settings import Settings

FILE = Path(__file__).parents[1] / "interplay" / "results.py"
_HEADER = '''"""What the service answers: dictionaries, as JSON has them, with keys and types for editors and mypy.

Made from the service's own models by `make types`; a test fails where the two differ. Times are texts (ISO 8601). A
report that an earlier version wrote may lack a key that is `NotRequired`.
"""

from typing import Any, Literal, NotRequired, TypedDict
'''
_PLAIN = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}


def results_module() -> str:
    """Return the text of interplay/results.py."""
    _, document = models_json_schema([(model, "validation") for model in _models()], by_alias=True)
    schemas = {_name(key): schema for key, schema in document["$defs"].items()}
    schemas["SucceededAnalysis"] = _succeeded(schemas["Analysis"], "report_id", "It has a report.")
    schemas["SucceededFetch"] = _succeeded(schemas["Fetch"], "resource_id", "It has made a resource.")
    parts = [_typed_dict(name, schema) for name, schema in _in_order(schemas) if schema.get("type") == "object"]
    kinds = " | ".join(model.__name__ for model in _report_kinds())
    parts.append(f'Report = {kinds}\n"""Told apart by `kind`."""')
    text = "\n\n\n".join([_HEADER.rstrip(), *parts]) + "\n"
    return _formatted(text)


def _succeeded(ended: dict[str, Any], result: str, description: str) -> dict[str, Any]:
    """Return the schema of what is known to have succeeded: it has a result."""
    known = {"status": {"const": "succeeded"}, result: {"type": "string"}}
    return {**ended, "properties": {**ended["properties"], **known}, "description": description}


def _report_kinds() -> tuple[type[BaseModel], ...]:
    union: tuple[type[BaseModel], ...] = get_args(get_args(reports.Report)[0])
    return union


def _models() -> list[type[BaseModel]]:
    """Return the models of successful answers in the OpenAPI document; for a page, the model of its items."""
    with tempfile.TemporaryDirectory() as folder:
        document = create_app(Settings(data_dir=Path(folder))).openapi()
    schemas = document["components"]["schemas"]
    known = {model.__name__: model for model in _subclasses(BaseModel) if model.__module__.startswith("app.")}
    found: dict[type[BaseModel], None] = {}
    for methods in document["paths"].values():
        for method in methods.values():
            for status, answer in method["responses"].items():
                schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
                if status.startswith("2") and "$ref" in schema:
                    name = schema["$ref"].rsplit("/", 1)[1]
                    if name.startswith("Page_"):
                        name = schemas[name]["properties"]["items"]["items"]["$ref"].rsplit("/", 1)[1]
                    found[known[name.removesuffix("-Output")]] = None
    return [*found, *_report_kinds()]


def _subclasses(model: type[BaseModel]) -> list[type[BaseModel]]:
    return [found for child in model.__subclasses__() for found in (child, *_subclasses(child))]


def _in_order(schemas: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the schemas in an order in which each follows those that it refers to."""
    done: dict[str, Any] = {}

    def add(name: str) -> None:
        if name in done:
            return
        for other in sorted(_references(schemas[name])):
            add(other)
        done[name] = schemas[name]

    for name in sorted(schemas):
        add(name)
    return [*done.items()]


def _references(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return {name for entry in schema for name in _references(entry)}
    if not isinstance(schema, dict):
        return set()
    own = {_name(schema["$ref"].rsplit("/", 1)[1])} if "$ref" in schema else set()
    return own | {name for key, entry in schema.items() if key != "discriminator" for name in _references(entry)}


def _name(key: str) -> str:
    # pydantic names an instance of a generic model like Provenance_PathOptions_.
    return "".join(key.split("_"))


def _typed_dict(name: str, schema: dict[str, Any]) -> str:
    properties, required = schema.get("properties", {}), {*schema.get("required", ())}
    fields = {
        key: _type(value) if key in required else f"NotRequired[{_type(value)}]" for key, value in properties.items()
    }
    if any(keyword.iskeyword(key) for key in fields):
        members = ", ".join(f'"{key}": {text}' for key, text in fields.items())
        return f'{name} = TypedDict("{name}", {{{members}}})'
    doc = " ".join(schema.get("description", "").split())
    wrapped = "\n".join(textwrap.wrap(f'    """{doc}"""', 120, subsequent_indent="    "))
    lines = [wrapped, ""] if doc else []
    return "\n".join([f"class {name}(TypedDict):", *lines, *(f"    {key}: {text}" for key, text in fields.items())])


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _name(schema["$ref"].rsplit("/", 1)[1])
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return f"Literal[{', '.join(map(repr, values))}]"
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return " | ".join(dict.fromkeys(map(_type, alternatives)))
    match schema.get("type"):
        case "array":
            return f"list[{_type(schema['items'])}]" if "items" in schema else "list[Any]"
        case "object":
            values = schema.get("additionalProperties", True)
            return f"dict[str, {_type(values) if isinstance(values, dict) else 'Any'}]"
        case str(plain):
            return _PLAIN[plain]
    return "Any"


def _formatted(text: str) -> str:
    command = [sys.executable, "-m", "ruff"]
    place = ["--stdin-filename", str(FILE)]
    for arguments in (["check", "--fix-only", "--quiet", *place, "-"], ["format", "--quiet", *place, "-"]):
        text = subprocess.run([*command, *arguments], input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    FILE.write_text(results_module())
