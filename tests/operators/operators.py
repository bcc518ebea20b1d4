"""Lets torchvision as PyPI has it be imported beside a CPU build of torch, in the tests alone.

torchvision's compiled part wants CUDA and does not load there. The rest of it, and timm and transformers' vision models
with it, needs no more of that part than that two operators exist, which none of our networks calls. They are defined at
the moment when torchvision is imported: a process that never does so never loads torch for it.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_kept: list[Any] = []


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing itself: it is asked first, and knows then that torchvision is about to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _define()
        return None


def define_before_torchvision() -> None:
    """Define the operators once torchvision is imported in this process, and no earlier."""
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def _define() -> None:
    import torch

    # A torch with CUDA loads the compiled part, which brings the operators itself.
    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
