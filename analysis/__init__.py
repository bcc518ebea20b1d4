"""The mathematics: torch in, plain dataclasses out. No HTTP, no database, no queue."""
