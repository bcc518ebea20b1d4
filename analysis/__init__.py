"""The mathematics: torch in, plain dataclasses out. Knows no HTTP, no database, no queue."""
