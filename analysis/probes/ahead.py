"""Make or send batches while the caller works with the previous one."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from .inputs import Inputs, each, named

T = TypeVar("T")


def sent_ahead(parts: Iterable[Inputs], device: torch.device) -> Iterator[Inputs]:
    """Copy parts to a GPU, each while the caller computes with the previous one.

    Memory: three parts on the GPU (in use, arrived, being copied) and at most as many pinned, whose memory torch
    reclaims once their copies are done.
    """
    copies: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    computed: deque[torch.cuda.Event] = deque()

    def send(part: Inputs) -> tuple[Inputs, torch.cuda.Event]:
        """Start the copy of a part, and return the event of its end."""
        with torch.cuda.stream(copies):
            return each(part, lambda t: t.pin_memory().to(device, non_blocking=True)), copies.record_event()

    sending = map(send, parts)
    following = next(sending, None)
    while following is not None:
        sent, arrived = following
        if len(computed) == 2:
            # Kernel launches run ahead of computation: without this wait the whole probe would end up on the GPU.
            computed.popleft().synchronize()
        following = next(sending, None)
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        # The copy stream owns this memory, and must not reuse it before the computation is done.
        for tensor in named(sent).values():
            tensor.record_stream(computing)
        yield sent
        computed.append(torch.cuda.current_stream(device).record_event())


def one_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield the same items, each made in a thread while the caller works with the previous one."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
    finally:
        # The thread may still be making an item, and cannot be interrupted.
        pool.shutdown()
        items.close()
