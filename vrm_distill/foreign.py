"""State dicts as other code saves them: found in its files without executing anything, and named as the network is."""

import pickle
import warnings
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

# The keys under which files hold a state dict, the best first: a running mean of the weights comes before the weights.
_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "net", "network")
# Compiling and data parallelism put these before names, at the front or within.
_WRAPPERS = ("module", "_orig_mod")
_SHOWN = 5


class _Inert:
    """Stands for what a checkpoint holds beside its tensors: takes anything, keeps nothing, does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# Harmless things that research code saves beside the weights. The reader builds an _Inert for each: not even these
# are executed. Anything else is refused.
_BESIDE = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace", "types.SimpleNamespace"),
    *(f"pathlib.{name}" for name in ("Path", "PurePath", "PosixPath", "WindowsPath", "PurePosixPath")),
    *(f"datetime.{name}" for name in ("date", "time", "datetime", "timedelta")),
    *("builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"),
)


def read_plain(path: str | PathLike) -> dict[str, Any]:
    """The dict of a PyTorch file, tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that would have to run code to be read.
    """
    inert = [(_Inert, name) for name in _BESIDE]
    try:
        # The warnings are of pickle protocols that the next lines refuse.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # What torch says is not passed on: it advises to switch the protection off.
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} cannot be read as plain tensors: it holds more than tensors and would have to run code to be "
            f"read, or is no PyTorch file"
        ) from None
    except Exception:  # whatever the bytes of another kind of file make the reader do
        raise ValueError(f"{path} cannot be read as plain tensors: it is damaged or no PyTorch file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def find_state(content: dict[str, Any], path: str | PathLike) -> dict[str, Tensor]:
    """The tensors by name in what :func:`read_plain` gave.

    Raises:
        ValueError: there are none, saying what there is.
    """
    for key in _KEYS:
        if isinstance(inner := content.get(key), dict) and inner:
            return find_state(inner, path)
    state = {str(name): x for name, x in content.items() if isinstance(x, Tensor)}
    if not state:
        raise ValueError(f"{path} holds no state dict: expected tensors by name, got {some(map(str, content))}")
    return state


def fit(model: nn.Module, state: dict[str, Tensor], path: str | PathLike) -> list[str]:
    """Load ``state`` into ``model``, whose names may be wrapped: by DistributedDataParallel, ``torch.compile``, or as a
    part of a larger module (Lightning's ``model.``). What belongs to other parts of that module is left out.

    Returns:
        What the user should be told was left out.

    Raises:
        ValueError: the names or the shapes do not fit, listing what is missing and what is left over.
    """
    wanted = model.state_dict()
    # Counters that older versions of torch did not have; without them a model has its own.
    needed = {name for name in wanted if not name.endswith("num_batches_tracked")}
    if not needed <= set(state):
        state = {_unwrapped(name): x for name, x in state.items()}
    prefix = _prefix(needed, state)
    mine = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    others = [name for name in state if not name.startswith(prefix)]
    missing, left = sorted(needed - set(mine)), [name for name in mine if name not in wanted]
    shapes = [
        f"{name} is {list(mine[name].shape)}, the network's {list(x.shape)}"
        for name, x in wanted.items()
        if name in mine and mine[name].shape != x.shape
    ]
    problems = [f"missing {some(missing)}"] if missing else []
    problems += [f"left over {some(left)}"] if left else []
    problems += [some(shapes)] if shapes else []
    if problems:
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict({**{name: x for name, x in wanted.items() if name not in mine}, **mine})
    return [f"{path}: left out {some(others)}, which are not of the network"] if others else []


def some(names) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefix(needed: set[str], state: dict[str, Tensor]) -> str:
    """The one prefix under which all that is needed is found; none if there is no such, or more than one."""
    if needed <= set(state):
        return ""
    first = min(needed, key=len)
    prefixes = [name.removesuffix(first) for name in state if name.endswith("." + first)]
    whole = [prefix for prefix in prefixes if all(prefix + name in state for name in needed)]
    return whole[0] if len(whole) == 1 else ""
