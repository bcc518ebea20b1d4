"""Lets torchvision as PyPI has it be imported beside a CPU build of torch, in the tests alone.

torchvision's compiled part wants CUDA and does not load there. The rest of it, and timm and transformers' vision models
with it, needs no more of that part than that two operators exist, which none of our networks calls. They are defined at
the moment when torchvision is looked for: a process that never does so never loads torch for it.

Python imports a module of this name when it starts: the tests have this folder on the PYTHONPATH of what they start,
and import it themselves.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_kept: list[Any] = []


class BeforeTorchvision(MetaPathFinder):
    """Finds nothing itself: it is asked first, and knows then that torchvision may be imported next."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _define()
        return None


def _define() -> None:
    from torch.library import Library
    from torch.version import cuda

    # A torch with CUDA loads the compiled part, which brings the operators itself.
    if cuda is None:
        library: Any = Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


# By name: where pytest itself was started with this folder on its path, the module is imported under two.
if not any(type(finder).__name__ == BeforeTorchvision.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, BeforeTorchvision())

# By its path, as the tests' package is not on the path of every process. One folder serves all: workers keep what
# they can import by the folders of their search path.
if "KILLED_AT" in os.environ:
    runpy.run_path(str(Path(__file__).parents[1] / "reliability" / "boundaries.py"))
