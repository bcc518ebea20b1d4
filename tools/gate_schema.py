"""Write the JSON Schema of a gate's file, for editors: `python -m tools.gate_schema` writes docs/gate.schema.json."""

import json
from pathlib import Path

from app.gates.form import file_schema

FILE = Path(__file__).parents[1] / "docs" / "gate.schema.json"


def main() -> None:
    """Write the schema of this version of the service."""
    FILE.write_text(json.dumps(file_schema(), indent=1) + "\n")


if __name__ == "__main__":
    main()
