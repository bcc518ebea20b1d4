"""A service that may fetch files, and the server on loopback that has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.services import Service, running
from tests.sources import SourceServer, source_server


@dataclass
class Elsewhere:
    """A service, and the server that it may fetch from: what lies below /nets, and all of `org` on the Hub."""

    service: Service
    server: SourceServer

    def address(self, path: str) -> str:
        """Return the address of a file below /nets."""
        return f"{self.server.url}/nets/{path}"


@contextmanager
def elsewhere_running(data_dir: Path) -> Iterator[Elsewhere]:
    """Run both for a block."""
    with source_server() as server:
        sources = f"{server.url}/nets inside, hf://org, hf://datasets/org"
        with running(data_dir, sources=sources, hub_url=server.url) as service:
            yield Elsewhere(service, server)
