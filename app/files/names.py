"""Names of members within zips and tars: one policy for all archives of strangers."""

import re
from pathlib import PurePosixPath

_MAX_NAME_BYTES = 1024
_DRIVE = re.compile(r"[A-Za-z]:")


def unsafe(name: str) -> str | None:
    """Return why a member's name is refused, as a clause; None for a plain relative path.

    >>> unsafe("cat/1.png"), unsafe("../evil.png")
    (None, 'leads out of its folder')
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or _DRIVE.match(name):
        return "leads out of its folder"
    if not name.isprintable() or not 0 < len(name.encode(errors="replace")) <= _MAX_NAME_BYTES:
        return f"must be printable and of 1 to {_MAX_NAME_BYTES} bytes"
    return None
