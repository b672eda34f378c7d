"""The implementations of the loss, each in the file or folder of its name, and the registry of them."""

from vrm_kernels.backends.contract import Backend
from vrm_kernels.backends.registry import AUTO, REGISTRY, check_name, describe, resolve

__all__ = ["AUTO", "REGISTRY", "Backend", "check_name", "describe", "resolve"]
