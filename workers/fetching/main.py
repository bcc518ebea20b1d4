"""`python -m workers.fetching.main`: fetch one file, in a process of its own, and end.

Its environment holds the credentials of this one source, by their usual names. So no other credentials of the service
can get out, and an end of this process, for whatever reason, ends nothing else.
"""

import os
import sys
import threading
from contextlib import closing

from app.errors import ServiceError, SourceDenied, SourceNotAllowed
from app.files.apart import bound_this_process
from app.sources import BUCKETS, Allowed, Source, entry_for, parse_allowed, parse_source
from app.staging import StorageUnavailable
from workers.fetching import hub, web
from workers.fetching.buckets import Bucket
from workers.fetching.messages import Order, Told, problem_of
from workers.fetching.origins import Origin
from workers.fetching.transfer import transfer

# The variable with the bearer token of this source.
BEARER = "SOURCE_BEARER"
# A description of the largest size takes some hundred MB.
_MOST_MEMORY_BYTES = 4 * 2**30


def main() -> None:
    """Read an order from standard input, and write lines to standard output until the file is there, or cannot be."""
    order = Order.model_validate_json(sys.stdin.buffer.readline())
    # When input ends the worker has ended: nothing waits for the file, and another worker may want to write it.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    bound_this_process(_MOST_MEMORY_BYTES)
    os.nice(5)

    def tell(told: Told) -> None:
        sys.stdout.write(told.model_dump_json() + "\n")
        sys.stdout.flush()

    try:
        source, allowed = parse_source(order.source), parse_allowed(order.sources)
        with closing(open_origin(order, source, allowed)) as origin:
            told = Told(fetched=transfer(origin, order, source.shown, lambda made: tell(Told(progress=made))))
    except (ServiceError, StorageUnavailable) as error:
        told = Told(problem=problem_of(error))
    tell(told)
    os._exit(0)


def open_origin(order: Order, source: Source, allowed: tuple[Allowed, ...]) -> Origin:
    """Return the source of an order.

    Raises:
        SourceNotAllowed: the operator does not list it, or no more.
        SourceDenied: credentials that it names are not there.
    """
    entry = entry_for(allowed, source)
    if entry is None:
        raise SourceNotAllowed(f"{source.shown} is not among INTERPLAY_SOURCES of the worker.", address=source.shown)
    if source.scheme in BUCKETS:
        return Bucket(source, signed=bool(entry.credentials), silence_seconds=order.silence_seconds)
    token = os.environ.get(BEARER)
    if entry.credentials and not token:
        raise SourceDenied(
            f"INTERPLAY_SOURCES names {entry.credentials}, which the worker's environment does not have."
        )
    reach = hub.reach_of(order.hub_url, allowed) if source.scheme == "hf" else web.reach_of(allowed, own=entry)
    client = web.client_for(reach, token=token, silence_seconds=order.silence_seconds)
    return hub.Hub(source, order.hub_url, client) if source.scheme == "hf" else web.Web(source, client)


if __name__ == "__main__":
    main()
