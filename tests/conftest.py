import os

import pytest
import torch

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # of this process, and of those that it starts
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

if "VRM_TEST_DEVICE" in os.environ:  # before helpers, which asks for it
    torch.set_default_device(os.environ["VRM_TEST_DEVICE"])

import torchvision_import  # noqa: F401
from helpers import BACKENDS
from hypothesis import HealthCheck, settings

from vrm_kernels import backends

pytest.register_assert_rewrite("parity_suite")
settings.register_profile(
    "reproducible",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("reproducible")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """One worker takes all tests that share what a module's fixture has made. Those that wait for a compiler are begun
    first, so that none of them is what is left in the end."""
    for item in items:
        fixtures = (definition for found in item._fixtureinfo.name2fixturedefs.values() for definition in found)
        if any(definition.scope == "module" for definition in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


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
