"""Which edges count: exactly the reference's away from the threshold; at it, flips counted and bounded."""

import parity_suite
import pytest
import torch
from helpers import MODES, Case, evaluate, evaluate_relation, inputs, make_logits
from parity_suite import PERCENTILES

from vrm_kernels.backends.contract import Views, both_graphs
from vrm_kernels.graph import pruning


class TestMask(parity_suite.Mask):
    """On every backend."""


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("percentile", PERCENTILES)
def test_kept_share_is_the_percentile(any_backend, percentile, relations):
    """Of n distinct entropies, floor(q (n - 1)) + 1 lie at or below the q-quantile; self-edges are not among them."""
    b, c = 20, 15
    logits = make_logits(Case((b, c)), torch.float64, seed=1)
    kept = evaluate(any_backend, logits, unreliable_pruning_percentile=percentile, relations=relations).kept
    for count, vertices in zip(kept, (b, c), strict=True):
        edges = vertices**2 if relations == "inter_view" else 2 * vertices * (2 * vertices - 1)
        assert count == int(percentile / 100 * (edges - 1) + 1e-9) + 1


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("scale", [1.0, 1e-1, 1e-2, 1e-3])
def test_flips_at_the_threshold_are_bounded(backend, scale, relations):
    """Flatter and flatter softmaxes: no more edges change sides than lie within rounding of the threshold."""
    shape, percentile = (48, 32), 30.0
    logits = make_logits(Case(shape, scale=scale), torch.float32, seed=4)
    settings = {"unreliable_pruning_percentile": percentile, "relations": relations}
    kept = evaluate(backend, logits, **settings).kept
    oracle = evaluate("reference", [x.double() for x in logits], **settings).kept
    complete = relations == "complete"
    graphs = both_graphs(Views(*(x.double() for x in logits)), complete)
    flips = []
    for count, wanted, (_, probs) in zip(kept, oracle, graphs, strict=True):
        entropy = pruning.joint_entropy(*probs)
        if complete:
            entropy = entropy[~torch.eye(len(entropy), dtype=torch.bool)]
        threshold = pruning.quantile_sorted(entropy.flatten(), percentile / 100)
        rounding = 32 * torch.finfo(torch.float32).eps * float(entropy.abs().max())
        flips.append(abs(count - wanted))
        assert flips[-1] <= int(((entropy - threshold).abs() <= rounding).sum())
    if scale >= 1e-1:
        assert max(flips) <= 1


def test_the_mask_carries_no_gradient(any_backend):
    """The probabilities move with the logits, the mask does not: the gradient is that of the kept edges held fixed."""
    logits = inputs(Case((9, 6), seed=950), torch.float64)
    probs = tuple(x.softmax(1) for x in logits[:2])
    through_logits = evaluate(any_backend, logits, beta=0.0)
    held = evaluate_relation(any_backend, logits, probs=probs, percentile=30.0)
    for grad, expected in zip(through_logits.grads, held.grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
