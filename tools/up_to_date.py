"""Whether the extensions that lie in the source tree are those that a build here and now would give.

Exit status 1 and the reason, where they have to be built again: csrc was changed, torch was swapped, or what kept them
from being built may be over. ``make build`` asks.
"""

import importlib.metadata
import json
import os

from build_extensions import ROOT, build_record


def why_not() -> str:
    path = ROOT / "vrm_kernels" / build_record.NAME
    if not path.exists():
        return "never built"
    record = json.loads(path.read_text())
    torch = importlib.metadata.version("torch")
    for backend, of_backend in record.items():
        if of_backend["torch"] != torch:
            return f"built beside torch {of_backend['torch'] or 'nothing'}, and this is torch {torch}"
        if of_backend["sources"] != build_record.fingerprint(ROOT / "csrc", backend):
            return "the sources have changed"
    if record["cpp"]["reason"] and not os.environ.get("VRM_KERNELS_NO_EXTENSION"):
        return f"tried again: {record['cpp']['reason']}"
    return ""


if __name__ == "__main__":
    raise SystemExit(why_not() or None)
