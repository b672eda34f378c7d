import os

import pytest
import torch

if "VRM_TEST_DEVICE" in os.environ:  # before helpers, which asks for it
    torch.set_default_device(os.environ["VRM_TEST_DEVICE"])

from helpers import BACKENDS
from hypothesis import HealthCheck, settings

from vrm_kernels import backends

settings.register_profile(
    "reproducible",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("reproducible")


def _usable(name: str) -> str:
    usable, note = backends.REGISTRY[name].status()
    if not usable:
        pytest.skip(f"backend {name!r}: {note}")
    return name


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """Each backend but the oracle."""
    return _usable(request.param)


@pytest.fixture(params=["reference", *BACKENDS])
def any_backend(request) -> str:
    return _usable(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
