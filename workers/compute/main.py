"""The compute process: reads tasks from standard input, writes progress and results to standard output.

`workers/child.py` starts it and documents the lines.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
import time

from analysis import clock
from app.errors import first_line, problem
from app.logs import about, start_logging
from app.settings import freeze_loaded_objects, load_settings
from app.storage import Storage
from workers.tasks import Hello, OfAnalysis, Progress, Work

logger = logging.getLogger("interplay.compute")


def main() -> None:
    """Compute tasks until standard input ends; never return."""
    try:
        _serve_tasks()
    except SystemExit as refusal:
        logger.error("the compute process cannot start: %s", refusal)
    except BaseException:
        logger.exception("the compute process ends")
    finally:
        # Not by `sys.exit`, which the thread that reads tasks would block.
        os._exit(1)


def _serve_tasks() -> None:
    # Ctrl-C in a terminal reaches every process of it; the worker decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Output printed by native code must not mix with the messages.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    tasks: queue.SimpleQueue[Work] = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(tasks,), daemon=True).start()

    # Imported late, so that the reader above already watches for the worker's end while torch loads.
    from workers.compute import runner
    from workers.compute.features import FeatureCache

    def send(message: Hello | OfAnalysis) -> None:
        output.write(json.dumps(message.model_dump(), allow_nan=False) + "\n")
        output.flush()

    settings = load_settings()
    start_logging(settings)
    device = runner.set_up(settings.device, settings.threads, settings.device_memory_bytes)
    try:
        storage = Storage(settings)
    except OSError as error:
        # The worker reports it in one sentence, possibly a moment later.
        raise SystemExit(f"its storage cannot be used: {first_line(error)}") from error
    steps = runner.Runner(
        device,
        FeatureCache(storage, settings.max_features_bytes),
        settings.max_loaded_bytes,
        settings.data_dir / "staging",
    )
    send(runner.describe(device, settings.device_memory_bytes))
    freeze_loaded_objects()
    while True:
        work = tasks.get()
        analysis_id = work.step.analysis_id

        def tell(phase: str, done: int, total: int, analysis_id: str = analysis_id) -> None:
            send(OfAnalysis(analysis_id=analysis_id, progress=Progress(phase=phase, done=done, total=total)))

        with about(analysis_id=analysis_id, request_id=work.step.request_id):
            began = time.monotonic()
            course = clock.Course() if work.timed else None
            clock.course.set(course)
            body, refusal = steps.run(work, tell)
            logger.info("%s took %.3f s", work.step.step, time.monotonic() - began)
        try:
            phases = course.phases if course else []
            send(OfAnalysis(analysis_id=analysis_id, body=body, problem=refusal, phases=phases))
        except ValueError:
            logger.exception("the result of analysis %s is not JSON", analysis_id)
            detail = "This is a fault of the service: its result holds what JSON cannot. The worker's log says more."
            refusal = problem("internal-error", "Internal error", detail)
            send(OfAnalysis(analysis_id=analysis_id, problem=refusal))


def _read_tasks(tasks: "queue.SimpleQueue[Work]") -> None:
    for line in sys.stdin.buffer:
        tasks.put(Work.model_validate_json(line))
    # The worker has ended, for whatever reason: nothing waits for the computation.
    os._exit(0)


if __name__ == "__main__":
    main()
