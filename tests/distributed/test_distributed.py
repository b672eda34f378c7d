"""The loss of the global batch over gloo processes is the loss of one process on the concatenated batch."""

import functools

import distributed_workers as workers
import pytest
import torch
import torch.distributed as dist
from helpers import MODES, Case
from process_group import launch

from vrm_kernels import VRMLoss, backends
from vrm_kernels.backends.contract import LossSettings
from vrm_kernels.graph import selection

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")

USABLE = [name for name, backend in backends.REGISTRY.items() if backend.runs_on("cpu") and backend.status()[0]]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# Batch sizes of the processes: even, uneven, one empty, and more processes than classes.
SIZES = {
    1: ([12],),
    2: ([6, 6], [3, 9], [0, 12]),
    3: ([4, 4, 4], [7, 1, 4], [5, 0, 7]),
    4: ([3, 3, 3, 3], [1, 2, 6, 3], [6, 0, 6, 0]),
}
WORLDS = tuple(SIZES)
STORED = {}
WITHOUT_STORING = {"shares.STORED_ENTROPY_BYTES": 256}  # entropies are computed again, a few rows at a time
BRACKETED = {"threshold.BRACKETED_EDGES": 0}
MISSED = BRACKETED | {"shares.Share.sample": workers.far_sample}


def parity_cases(world: int) -> list:
    cases = []
    for relations in MODES:
        for sizes in SIZES[world]:
            for dtype in TOLERANCE:
                for backend in USABLE:
                    case = Case((12, 7), relations=relations)
                    bracketed = (BRACKETED, BRACKETED | WITHOUT_STORING, MISSED) if sizes == SIZES[world][-1] else ()
                    for patches in (STORED, WITHOUT_STORING, *bracketed):
                        cases.append((backend, dtype, case, sizes, False, patches))
        for percentile in (0.0, 50.0, 100.0):
            case = Case((12, 7), relations=relations, percentile=percentile)
            cases.extend((backend, torch.float64, case, SIZES[world][-1], True, {}) for backend in USABLE)
        # Fewer classes than processes; residuals beyond delta.
        for case in (Case((12, 3), relations=relations), Case((12, 7), relations=relations, delta=0.1)):
            cases.extend((backend, torch.float64, case, SIZES[world][0], False, {}) for backend in USABLE)
    return cases


@functools.cache
def parity_results(world: int) -> list[list[dict]]:
    return launch(world, "parity", parity_cases(world))


def describe(case) -> str:
    backend, dtype, case, sizes, ce, patches = case
    shape = "x".join(map(str, case.shape))
    patched = "+".join(name.split(".")[-1] for name in patches)
    return "-".join(
        map(str, [backend, str(dtype)[6:], case.relations, case.percentile, shape, case.kind, sizes, ce, patched])
    )


@pytest.mark.parametrize(
    "world, k, case",
    [pytest.param(w, k, c, id=f"{w}-{describe(c)}") for w in WORLDS for k, c in enumerate(parity_cases(w))],
)
def test_loss_and_gradients_are_those_of_one_process(world, k, case):
    dtype = case[1]
    results = [rank[k] for rank in parity_results(world)]
    assert len({result["value"] for result in results}) == 1  # the same bits on every process
    for result in results:
        for name, error in result.items():
            if name != "value":
                assert error <= (0 if name.startswith("kept") else TOLERANCE[dtype]), (name, error)


@pytest.mark.parametrize("world", WORLDS)
def test_twenty_steps_of_training_end_in_the_same_weights(world):
    cases = [(dtype, relations, sizes, "plain") for dtype in TOLERANCE for relations in MODES for sizes in SIZES[world]]
    for errors in launch(world, "training", cases):
        for error, (dtype, *rest) in zip(errors, cases, strict=True):
            assert error <= TOLERANCE[dtype], (error, rest)


@pytest.mark.parametrize("kind", ["compiled", "checkpointed", "sharded"])
def test_training_by_other_means_ends_in_the_same_weights(kind):
    for errors in launch(2, "training", [(torch.float64, "inter_view", [6, 6], kind)]):
        assert errors[0] <= 1e-10


def test_accumulated_gradients_are_the_sum_over_the_global_batches():
    for errors in launch(2, "training", [(torch.float64, "inter_view", [5, 7], "accumulated")]):
        assert errors[0] <= 1e-10


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("world, sizes", [(2, [5, 7]), (3, [4, 0, 8]), (4, [3, 3, 3, 3])])
def test_each_process_computes_a_share(world, sizes, relations):
    views = 2 if relations == "complete" else 1
    samples, classes = sum(sizes), 10
    blocks = [classes * (k + 1) // world - classes * k // world for k in range(world)]
    for rank, seen in enumerate(launch(world, "shares", relations, sizes, classes)):
        wanted = [(sizes[rank], samples), (blocks[rank], classes)]
        assert sorted(seen, key=lambda share: share[1], reverse=True) == [
            (views * m, views * n) for m, n in wanted if m > 0
        ]
    assert max(blocks) - min(blocks) <= 1


@pytest.mark.parametrize("relations", MODES)
def test_bytes_received_are_those_of_the_formula(relations):
    world, batch, classes = 3, 5, 6
    settings = 1 + 1 + 4 + len(LossSettings._fields) + 3  # batch size, classes, dtypes, settings, modes
    bins = sum(2**bits for _, bits in selection.digits(32))
    matrix = (world - 1) * batch * classes * 4  # the other processes' rows
    block = matrix // world  # of this process's columns
    for with_gradients, without in launch(world, "traffic", batch, classes, relations):
        whole, columns = (4, 0) if relations == "complete" else (2, 3)
        reduce = 2 * 2 * bins * 8 + 5 * 8  # the four terms and what the cross-entropies are divided by
        expected = {"gather": whole * matrix + (world - 1) * settings * 8, "reduce": reduce}
        if columns:
            expected["swap"] = columns * block
        assert without == expected
        gradients = 2 * matrix if relations == "complete" else matrix + block
        assert with_gradients == expected | {"swap": columns * block + gradients}


def test_half_precision_and_class_probabilities():
    for result in launch(2, "half_types"):
        for errors in result:
            value = errors.pop("value")
            assert value > 0 and all(
                error <= 1e-2 if "grad" in name else error <= 1e-5 for name, error in errors.items()
            )


def test_not_a_number_on_one_process_poisons_all():
    assert launch(2, "not_a_number") == [[True] * 4] * 2


def test_a_process_group_of_some_of_the_processes():
    for error, refusal in launch(4, "subgroups"):
        assert error <= 1e-10
        assert "not a member" in refusal


def test_same_inputs_same_bits_on_every_process():
    assert launch(3, "deterministic") == [True] * 3


def test_the_mean_over_the_processes_is_the_gradient():
    assert max(launch(2, "unreduced_rule")) <= 1e-10


def test_mismatches_are_named_on_every_process():
    results = launch(2, "mismatch")
    assert results[0] == results[1]
    said = results[0]
    for name in workers.MISMATCHES:
        assert name in said[name] and "rank 0 has" in said[name] and "rank 1 has" in said[name]
    assert "rank 0 has 5, rank 1 has 6" in said["number of classes"]
    assert "torch.float32" in said["dtype of logits_student_virtual"]
    assert "every process" in said["empty"]


@pytest.mark.parametrize("how", ["dies", "stalls"])
def test_a_lost_process_is_an_error_within_the_time_out(how):
    results = launch(3, "lost", how, timeout=workers.TIMEOUT, dying=(2,) if how == "dies" else ())
    for rank, (said, seconds) in enumerate(results[:2]):
        assert f"rank {rank} of 3" in said and "Another process of the group has ended" in said
        assert seconds < 2 * workers.TIMEOUT


def test_opcheck():
    assert launch(2, "opcheck") == [True] * 2


def test_without_a_process_group_it_is_the_loss_of_this_process():
    logits = [torch.randn(4, 3) for _ in range(4)]
    labels = torch.tensor([0, 1, 2, 0])
    gathered = VRMLoss(1.0, 1.0, gather_distributed=True)
    assert torch.equal(gathered(*logits, labels), VRMLoss(1.0, 1.0)(*logits, labels))
