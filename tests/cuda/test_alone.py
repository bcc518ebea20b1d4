"""What a machine with a GPU image's own packages has is enough."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of the service's dependencies those that such an image lacks.
MISSING = [
    "alembic",
    "altair",
    "beartype",
    "dbos",
    "fastapi",
    "obstore",
    "psycopg",
    "pydantic",
    "sqlalchemy",
    "uvicorn",
]


def test_nothing_of_the_service_is_imported() -> None:
    """The benchmarks for a GPU and its tests import where the service's own dependencies are missing."""
    script = f"""
import sys
sys.path.insert(0, ".")
for name in {MISSING}:
    sys.modules[name] = None
import benchmarks.cuda
import tests.cuda.conftest, tests.cuda.test_metrics, tests.cuda.test_passes, tests.cuda.test_sweeps
found = [name for name in ("app", "workers", "migrations") if name in sys.modules]
assert not found, found
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, check=True)
