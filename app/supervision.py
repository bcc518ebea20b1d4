"""Worker processes that this process starts, starts again when they die, and stops: one for each device."""

import contextlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from app.settings import DEVICE, Settings

logger = logging.getLogger("interplay")

#: Help of the option `--devices`.
DEVICES = "devices of the workers: all (each GPU, or the processor), or names such as cuda:0,cuda:1 (INTERPLAY_DEVICE)"

# How long a started process has to stop by itself before it is killed.
_STOP_SECONDS = 5.0
# How long torch may take to say how many GPUs there are.
_COUNT_SECONDS = 120.0


def devices_of(text: str | None, settings: Settings) -> list[str]:
    """Return the devices of the workers, one for each.

    Args:
        text: the value of `--devices`; None is the one device of the settings.
        settings: the settings.

    Raises:
        ValueError: a name is no device's, in words for the operator.
    """
    if text is None:
        return [settings.device]
    if text == "all":
        return [f"cuda:{index}" for index in range(_count_gpus())] or ["cpu"]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not re.fullmatch(DEVICE, name):
            raise ValueError(f"--devices takes `all`, or names such as cuda:0,cuda:1 or cpu, not {name!r}.")
    return names


def _count_gpus() -> int:
    """Return the number of CUDA devices, as torch sees them in a process of its own."""
    command = [sys.executable, "-m", "workers", "--count-gpus"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_COUNT_SECONDS, check=True)
    return int(found.stdout)


class Workers:
    """A worker process for each device, restarted whenever it dies.

    They load their modules at once, but begin only when allowed: the tables must exist.

    Args:
        settings: the settings. Without a number of threads, the workers share the processor's cores.
        devices: their devices.
    """

    def __init__(self, settings: Settings, devices: Sequence[str]) -> None:
        shared = {}
        if len(devices) > 1 and not settings.threads:
            shared["INTERPLAY_THREADS"] = str(max((os.cpu_count() or 1) // len(devices), 1))
        self._workers = [_SupervisedWorker(settings, {**shared, "INTERPLAY_DEVICE": device}) for device in devices]

    def start(self) -> None:
        """Start the processes."""
        for worker in self._workers:
            worker.start()

    def let_begin(self) -> None:
        """Let them begin to work."""
        for worker in self._workers:
            worker.let_begin()

    def stop(self) -> None:
        """Stop them, and wait for their end."""
        for worker in self._workers:
            worker.tell_to_stop()
        for worker in self._workers:
            worker.wait()


class _SupervisedWorker:
    """A worker process that is restarted whenever it dies, after ever longer pauses."""

    def __init__(self, settings: Settings, own: dict[str, str]) -> None:
        self._environment = {**os.environ, **own}
        self._telling = threading.Lock()
        self._may_begin = False
        self._process: subprocess.Popen[bytes] | None = None
        self._longest_pause = settings.worker_restart_max_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="worker-supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def let_begin(self) -> None:
        with self._telling:
            self._may_begin = True
            self._tell()

    def tell_to_stop(self) -> None:
        self._stopping.set()

    def wait(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _tell(self) -> None:
        if self._may_begin and self._process is not None:
            assert self._process.stdin is not None
            # It has died, and its successor gets the message; or it is stopping.
            with contextlib.suppress(BrokenPipeError, ValueError):
                self._process.stdin.write(b"begin\n")
                self._process.stdin.flush()

    def _supervise(self) -> None:
        pause = 0.5
        while not self._stopping.is_set():
            started = time.monotonic()
            # The worker stops when its standard input ends, so it does not outlive this process, however that dies.
            # It has a session of its own: Ctrl-C reaches only this process, which then stops the worker.
            process = subprocess.Popen(
                [sys.executable, "-m", "workers", "--stop-at-end-of-input", "--wait-for-input"],
                stdin=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
            with self._telling:
                self._process = process
                self._tell()
            while process.poll() is None and not self._stopping.wait(0.2):
                pass
            if self._stopping.is_set():
                _stop(process)
                return
            lived = time.monotonic() - started
            pause = 0.5 if lived > 60 else min(pause * 2, self._longest_pause)
            logger.error("the worker died with status %s and starts again in %.1f s", process.returncode, pause)
            self._stopping.wait(pause)


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
