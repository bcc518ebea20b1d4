"""The drawing process, which `app.api.drawing` starts.

Altair and the renderer take seconds to load and 200 MiB, and hold the interpreter.
"""

import json
import logging
import os
import queue
import sys
import threading

from app.api.charts.rendering import draw

logger = logging.getLogger(__name__)
# The process ends after this long without a chart to draw.
_IDLE_SECONDS = 300.0


def main() -> None:
    """Run the drawing process: read each chart as a line of JSON, write its size as a line and its bytes.

    It reads standard input and writes standard output. It ends when its input does, also in the middle of a chart, and
    after a while without requests.
    """
    # Output that libraries print must not get between the answers.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(tasks,), daemon=True).start()
    while True:
        try:
            task = json.loads(tasks.get(timeout=_IDLE_SECONDS))
        except queue.Empty:
            os._exit(0)
        try:
            drawn = draw(json.loads(task["data"]), task["name"], task["format"])
            output.write(b"%d\n" % len(drawn) + drawn)
        except Exception:
            # A bug of ours, which must not end this process.
            logger.exception("%s.%s was not drawn", task["name"], task["format"])
            output.write(b"-1\n")
        output.flush()


def _read_tasks(tasks: "queue.SimpleQueue[bytes]") -> None:
    for line in sys.stdin.buffer:
        tasks.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
