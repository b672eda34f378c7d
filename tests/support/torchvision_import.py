"""Imports torchvision, if it is installed: in every process of the tests, since what lightning warns of crosses from
one to another, and whoever reads it imports lightning and so torchvision."""

import importlib.util
import re
import sys
from pathlib import Path

import torch


def _import_torchvision() -> None:
    """Import torchvision, also a build whose compiled operators do not load beside a torch for the CPU.

    timm and torchdistill import it; none of what is tested here uses those operators, but importing torchvision
    describes some of them to torch, and fails where they do not exist. They are declared here for it.
    """
    try:
        import torchvision
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        folder = Path(importlib.util.find_spec("torchvision").origin).parent
        for name in re.findall(
            r'register_fake\("torchvision::(\w+)"\)', (folder / "_meta_registrations.py").read_text()
        ):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
_import_torchvision()
