"""`python -m workers`: one worker process. It serves the queue; its child computes.

The child takes longest to start, so it is started first: the imports of this process load meanwhile.
"""

import argparse
import logging
import os
import select
import signal
import sys
import threading
from typing import TYPE_CHECKING
from uuid import uuid4

from app import traces
from app.logs import start_logging
from app.refusals import CannotStart, starting
from app.settings import Settings, freeze_loaded_objects, load_settings
from app.supervision import DEVICES, Workers, devices_of
from workers.child import ComputeChild

if TYPE_CHECKING:
    from workers.demand import Demand
    from workers.liveness import Presence
    from workers.locks import Line
    from workers.steps import Host

logger = logging.getLogger("interplay")

# Plans of a worker at a time, beside what it computes. They only look after what turns do by themselves.
_PLANS_AT_A_TIME = 16
# Nobody notices when these start a little later.
_OTHERS_POLLING_SECONDS = 1.0
_NEVER_SECONDS = 3600.0


def main(arguments: list[str] | None = None) -> None:
    """Work until SIGTERM or Ctrl-C; the next worker resumes the analyses that run then.

    With `--devices`, supervise a worker process for each device.
    """
    parser = argparse.ArgumentParser(prog="interplay worker", description="Settings are INTERPLAY_... variables.")
    parser.add_argument(
        "--stop-at-end-of-input", action="store_true", help="stop when standard input ends, as it does with its parent"
    )
    parser.add_argument(
        "--wait-for-input", action="store_true", help="begin once a line comes on standard input: the tables are there"
    )
    parser.add_argument("--devices", help=DEVICES)
    parser.add_argument("--count-gpus", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.devices is not None and (options.stop_at_end_of_input or options.wait_for_input):
        parser.error("--devices supervises workers, which get the other options from it")
    if options.count_gpus:
        import torch

        sys.stdout.write(f"{torch.cuda.device_count()}\n")
        return
    settings = load_settings()
    start_logging(settings)
    if options.devices is not None:
        _supervise(settings, options.devices)
        return
    try:
        traces.start("worker")
    except traces.CannotTrace as refusal:
        sys.stderr.write(f"{refusal}\n")
        sys.exit(2)
    # A pipe, because a signal handler may run while its own thread holds a lock that it would need.
    told_to_stop, tell_to_stop = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(tell_to_stop, b"."))
    told_to_begin, tell_to_begin = os.pipe()
    if options.stop_at_end_of_input or options.wait_for_input:
        threading.Thread(target=_watch_input, args=(tell_to_begin, tell_to_stop), daemon=True).start()
    child = ComputeChild(settings)
    child.start()
    if options.wait_for_input and told_to_stop in select.select([told_to_begin, told_to_stop], [], [])[0]:
        child.kill()
        os._exit(0)  # not by `return`, which the thread that reads standard input would block
    try:
        _work(settings, child, told_to_stop)
    except CannotStart as refusal:
        sys.stderr.write(f"{refusal}\n")
        child.kill()
        sys.exit(2)


def _supervise(settings: Settings, devices: str) -> None:
    """Run a worker process for each device until SIGTERM or Ctrl-C."""
    try:
        workers = Workers(settings, devices_of(devices, settings))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        workers.start()
        workers.let_begin()
        threading.Event().wait()
    except KeyboardInterrupt:
        return
    finally:
        workers.stop()


def _work(settings: Settings, child: ComputeChild, told_to_stop: int) -> None:
    import migrations
    from app import queue
    from app.database import make_engine
    from app.storage import Storage
    from workers import offers
    from workers.liveness import Presence
    from workers.steps import Host
    from workers.workflows import register

    # A fresh id for each process, so that it does not count another process's unfinished work as its own.
    worker_id = str(uuid4())
    with starting(settings):
        engine, storage = make_engine(settings, few=True), Storage(settings)
        if lacking := migrations.lacking(engine):
            raise migrations.OtherTables(lacking)
    active: set[str] = set()
    presence = Presence(settings, engine, worker_id, active)
    while child.description is None:
        if not child.is_running():
            sys.exit("The compute process does not start; what it said stands above.")
        if select.select([told_to_stop], [], [], 0.1)[0]:
            child.kill()
            return
    presence.register(child.description)
    found = offers.Offers(child.description.families, child.description.untried)
    offers.start(found, settings.data_dir / "workers", engine, worker_id)
    host = Host(worker_id, settings, engine, queue.make_client(engine), storage, child, active)
    register(host)
    presence.on_fleet = _join_queue(host, presence.line, child.description.memory_bytes).share
    logger.info("worker %s is ready", worker_id)
    freeze_loaded_objects()
    stopping = threading.Event()
    threading.Thread(target=_keep_up, args=(presence, stopping), daemon=True).start()
    os.read(told_to_stop, 1)
    stopping.set()
    try:
        presence.withdraw()
    finally:
        # Running analyses stay pending in the queue, so there is no need to wait for their threads.
        child.kill()
        traces.stop()
        os._exit(0)


def _join_queue(host: "Host", line: "Line", memory_bytes: int) -> "Demand":
    from dbos import DBOS, DBOSConfig, Queue

    from app import queue
    from workers.demand import Demand, launch

    queue.close_pickle()
    config: DBOSConfig = {
        "name": queue.APPLICATION,
        "system_database_engine": host.engine,
        "serializer": queue.serializer(),
        "executor_id": host.worker_id,
        "application_version": queue.VERSION,
        "run_migrations": False,
        # Of its notifications, which nothing here sends or waits for. A listener would hold a connection.
        "use_listen_notify": False,
        "notification_listener_polling_interval_sec": _NEVER_SECONDS,
        # Of its schedules, of which there are none.
        "scheduler_polling_interval_sec": _NEVER_SECONDS,
        "log_level": host.settings.log_level.upper(),
    }
    library = DBOS(config=config)
    # Not those of a later version, whose workflows this one does not have.
    large = queue.sized(memory_bytes)
    names = [*queue.QUEUES, large]
    DBOS.listen_queues(names)
    seconds = host.settings.queue_polling_seconds
    others = max(_OTHERS_POLLING_SECONDS, seconds)

    def register() -> list[Queue]:
        return [
            DBOS.register_queue(queue.QUEUE, worker_concurrency=1, polling_interval_sec=seconds),
            DBOS.register_queue(large, worker_concurrency=1, polling_interval_sec=seconds),
            DBOS.register_queue(queue.PLANS, worker_concurrency=_PLANS_AT_A_TIME, polling_interval_sec=others),
            DBOS.register_queue(queue.FETCHES, worker_concurrency=queue.FETCHES_AT_A_TIME, polling_interval_sec=others),
        ]

    # The thread of the first queue asks for all of them.
    ages = {name: seconds / 2 if name == queue.QUEUE else others for name in names}
    dialect = host.engine.dialect.name
    demand = Demand(line, dialect, ages, [queue.QUEUE, large], lambda: host.slot.is_taken)
    launch(library, register, demand)
    return demand


def _watch_input(tell_to_begin: int, tell_to_stop: int) -> None:
    # Not through sys.stdin: a thread that waits in its buffer aborts the interpreter at shutdown.
    if os.read(0, 1):
        os.write(tell_to_begin, b".")
        while os.read(0, 4096):
            pass
    os.write(tell_to_stop, b".")


def _keep_up(presence: "Presence", stopping: threading.Event) -> None:
    try:
        presence.keep_up(stopping)
    finally:
        # A worker without a heartbeat must not continue: other workers take over its work.
        if not stopping.is_set():
            os._exit(3)


if __name__ == "__main__":
    main()
