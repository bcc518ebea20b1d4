"""Run all benchmarks: `python -m benchmarks` prints every row of the table and writes the rows as JSON."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch

from benchmarks import adapters, decoding, fanout, graphs, losses, memory, pages, paths, service, spectra
from workers.child import ARITHMETIC

PARTS = {
    "spectra": spectra,
    "losses": losses,
    "paths": paths,
    "adapters": adapters,
    "graphs": graphs,
    "memory": memory,
    "decoding": decoding,
    "service": service,
    "fanout": fanout,
    "pages": pages,
}


def main() -> None:
    # Both sides of every ratio run as the service's compute processes do; settings read at start need a new one.
    if any(name not in os.environ for name in ARITHMETIC):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**ARITHMETIC, **os.environ})
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of both sides of every ratio")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results.json"))
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="the others' rows stay")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    ran_on = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows = [
        {"part": part, **row, "device": ran_on, "threads": options.threads}
        for part in options.only
        for row in PARTS[part].rows(device)
    ]
    earlier = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    others = [row for row in earlier if row["part"] not in options.only]
    content = {"torch": torch.__version__, "machine": platform.machine(), "rows": [*others, *rows]}
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    for row in rows:
        facts = {key: value for key, value in row.items() if key not in ("part", "case", "reached", "against")}
        print(f"{'reached' if row['reached'] else 'MISSED '}  {row['case']}")
        if "against" in row:
            print(f"         against {row['against']}")
        print("         " + ", ".join(f"{key} {_short(value)}" for key, value in facts.items()))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
