"""``vrm-distill``: distil a student with Virtual Relation Matching; judge and export what came out."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

from vrm_distill.data import HOW_TO_INSTALL
from vrm_distill.failures import Refused, explain, printable

# The sub-commands, each ``vrm_distill.commands.NAME.main(argv)``. A command line that names none means the first.
COMMANDS = ("train", "eval", "export", "cache")
# The modules of the extra "distill", and what pip calls them.
_EXTRA = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "kornia": "kornia",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status (2: an option is refused, 1: it failed, 130: Ctrl-C).

    Whatever is raised below ends here, as a sentence.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and argv[0] in COMMANDS else COMMANDS[0]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no "±" shows a question mark
    # An installed command does not look for modules where it was started, as python -m does.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        if missing := missing_packages():
            raise Refused(None, missing)
        return importlib.import_module(f"vrm_distill.commands.{name}").main(argv)
    except Refused as error:
        print(f"vrm-distill: error: {printable(str(error))}\n(vrm-distill {name} --help)", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nvrm-distill: stopped before anything was written", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"\nvrm-distill: failed: {explain(error)}", file=sys.stderr)
        return 1


def missing_packages() -> str | None:
    """What to say if a package of the extra is not installed."""
    missing = [package for module, package in _EXTRA.items() if importlib.util.find_spec(module) is None]
    return f"{', '.join(missing)} not installed: {HOW_TO_INSTALL}" if missing else None


if __name__ == "__main__":
    sys.exit(main())
