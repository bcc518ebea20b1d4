"""What schemathesis cannot know of this service: how bytes of a resumable upload are sent. It loads this file."""

from typing import Any

import schemathesis


@schemathesis.serializer("application/offset+octet-stream")
def as_it_is(_: Any, value: Any) -> Any:
    """Return a body of bytes."""
    return value if isinstance(value, bytes) else str(value).encode()
