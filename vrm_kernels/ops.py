"""The custom operators: schema, fake kernel, and the one autograd rule of every backend.

The contract of a backend module, ``relation_graph``::

    relation_graph(a [M, D], b [N, D], teacher_a [M, D], teacher_b [N, D],
                   probs (P [M, K], P' [N, K]) | None, percentile, delta, exclude_self, need_grad)
        -> (loss [], kept [] int64, grad_a [M, D], grad_b [N, D])

Inputs have any strides and any of ``DTYPES``, mixed; results have ``compute_dtype(inputs)``. The gradients are those of
the loss (the upstream gradient is a scalar: backward only scales them) and are empty where ``need_grad`` is false.
``exclude_self`` says that both sides are one vertex set, whose M edges (i, i) do not exist. A module may also hold a
fused ``vrm_graphs``, both graphs of the loss in one call, which otherwise is built here from ``relation_graph``.
``reference`` is the exception: plain differentiable PyTorch, never wrapped in an operator.
"""

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vrm_kernels import backends
from vrm_kernels.backends import reference
from vrm_kernels.graph import pruning

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NO_DOUBLE_BACKWARD = (
    "second derivatives of the VRM loss are not supported by this backend: use backend='reference', which supports them"
)
NO_FORWARD_MODE = (
    "forward-mode derivatives (torch.func.jvp, jacfwd, dual tensors) of the VRM loss are not supported by this "
    "backend: use backend='reference', which supports them, or reverse mode"
)

_library = torch.library.Library("vrm_kernels", "FRAGMENT")
define = _library.define
define(
    "relation_graph(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor? probs_a, Tensor? probs_b, "
    "float percentile, float delta, bool exclude_self, bool need_grad, str backend) "
    "-> (Tensor loss, Tensor grad_a, Tensor grad_b, Tensor kept)"
)
define(
    "vrm_graphs(Tensor student_real, Tensor student_virtual, Tensor teacher_real, Tensor teacher_virtual, "
    "float alpha, float beta, float percentile, float delta, bool complete, bool need_grad, str backend) "
    "-> (Tensor loss, Tensor grad_real, Tensor grad_virtual, Tensor terms, Tensor kept)"
)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32: half precision is read, never accumulated in."""
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        return torch.float64
    return torch.float32


# ---- what the public functions call ---------------------------------------------------------------------------------


def relation_graph(a, b, teacher_a, teacher_b, *, probs, percentile, delta, backend) -> Tensor:
    """The loss of one graph on ``backend`` (a registered name, not "auto")."""
    if backend == "reference":
        dtype = compute_dtype(a, b, teacher_a, teacher_b)
        vectors = (x.to(dtype) for x in (a, b, teacher_a.detach(), teacher_b.detach()))
        with without_autocast(a.device.type):
            return reference.relation_graph(*vectors, probs, percentile, delta, False)[0]
    p, q = (None, None) if probs is None else probs
    teacher = teacher_a.detach(), teacher_b.detach()
    arguments = a, b, *teacher, p, q, percentile, delta, False, _needs_grad(a, b), backend
    return call(torch.ops.vrm_kernels.relation_graph, _relation_graph_impl, *arguments)[0]


def vrm_graphs(
    student_real, student_virtual, teacher_real, teacher_virtual, *, alpha, beta, percentile, delta, complete, backend
) -> tuple[Tensor, Tensor, Tensor]:
    """``(alpha L_inter_sample + beta L_inter_class, the two terms [2], the two kept counts [2])`` on ``backend``."""
    views = (student_real, student_virtual, teacher_real.detach(), teacher_virtual.detach())
    if backend == "reference":
        dtype = compute_dtype(*views)
        with without_autocast(student_real.device.type):
            losses, kept = zip(
                *(
                    reference.relation_graph(*vectors, probs, percentile, delta, complete)
                    for vectors, probs in both_graphs(*(x.to(dtype) for x in views), complete)
                ),
                strict=True,
            )
            return alpha * losses[0] + beta * losses[1], torch.stack(losses), torch.stack(kept)
    need_grad = _needs_grad(student_real, student_virtual)
    arguments = *views, alpha, beta, percentile, delta, complete, need_grad, backend
    loss, _, _, terms, kept = call(torch.ops.vrm_kernels.vrm_graphs, _vrm_graphs_impl, *arguments)
    return loss, terms, kept


def quantile(x: Tensor, q: float | Tensor) -> Tensor:
    """The exact quantile of 1-D float32 or float64 ``x``: selection on the CPU where it is built, else a sort."""
    if x.device.type == "cpu" and backends.REGISTRY["cpp"].status()[0]:
        return backends.REGISTRY["cpp"].load().quantile(x, *pruning.ranks(q, x.numel(), x))
    return pruning.quantile_sorted(x, q)


def both_graphs(student_real, student_virtual, teacher_real, teacher_virtual, complete):
    """The inter-sample and the inter-class graph: ``((a, b, teacher_a, teacher_b), (P, P'))`` of each."""
    probs = student_real.detach().softmax(1), student_virtual.detach().softmax(1)
    sample = (student_real, student_virtual, teacher_real, teacher_virtual)
    for transpose in (False, True):
        (a, b, ta, tb), (p, q) = ([x.t() if transpose else x for x in group] for group in (sample, probs))
        if complete:  # one vertex set on both sides
            a, ta, p = torch.cat((a, b)), torch.cat((ta, tb)), torch.cat((p, q))
            b, tb, q = a, ta, p
        yield (a, b, ta, tb), (p, q)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def without_autocast(device_type: str):
    """Relations and norms are float32 whatever the surrounding autocast says."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# ---- the operators --------------------------------------------------------------------------------------------------


def _relation_graph_impl(a, b, ta, tb, p, q, percentile, delta, exclude_self, need_grad, backend):
    probs = None if p is None else (p, q)
    with without_autocast(a.device.type):
        loss, kept, grad_a, grad_b = (
            backends.REGISTRY[backend]
            .load()
            .relation_graph(a, b, ta, tb, probs, percentile, delta, exclude_self, need_grad)
        )
    return loss, grad_a, grad_b, kept


def _vrm_graphs_impl(s, v, t, u, alpha, beta, percentile, delta, complete, need_grad, backend):
    module = backends.REGISTRY[backend].load()
    with without_autocast(s.device.type):
        if hasattr(module, "vrm_graphs"):
            return module.vrm_graphs(s, v, t, u, alpha, beta, percentile, delta, complete, need_grad)
        dtype = compute_dtype(s, v, t, u)
        losses, counts, grads = [], [], [0.0, 0.0]
        graphs = both_graphs(*(x.to(dtype) for x in (s, v, t, u)), complete)
        for (vectors, probs), weight, n in zip(graphs, (alpha, beta), s.shape, strict=True):
            loss, kept, *pair = module.relation_graph(*vectors, probs, percentile, delta, complete, need_grad)
            losses.append(loss)
            counts.append(kept)
            if not need_grad:
                continue
            if complete:  # the vertex set stood on both sides: add the sides, then cut it into its two views
                pair = (pair[0] + pair[1]).split(n)
            for k, grad in enumerate(pair):
                grads[k] = grads[k] + weight * (grad if len(losses) == 1 else grad.t())
        if not need_grad:
            grads = [s.new_empty(0, dtype=dtype), s.new_empty(0, dtype=dtype)]
        loss = alpha * losses[0] + beta * losses[1]
        return loss, *grads, torch.stack(losses), torch.stack(counts)


def relation_graph_fake(a, b, teacher_a, teacher_b, need_grad):
    dtype = compute_dtype(a, b, teacher_a, teacher_b)
    grads = [a.new_empty(x.shape if need_grad else (0,), dtype=dtype) for x in (a, b)]
    return a.new_empty((), dtype=dtype), *grads, a.new_empty((), dtype=torch.int64)


def vrm_graphs_fake(s, v, t, u, need_grad):
    dtype = compute_dtype(s, v, t, u)
    grads = [s.new_empty(x.shape if need_grad else (0,), dtype=dtype) for x in (s, v)]
    terms = s.new_empty((2,), dtype=dtype)
    return s.new_empty((), dtype=dtype), *grads, terms, s.new_empty((2,), dtype=torch.int64)


# ---- the one autograd rule ------------------------------------------------------------------------------------------


class _Rule(torch.autograd.Function):
    """Of both operators the first two inputs are the student's, the first output is the loss and the next two its
    gradients, which backward only scales. ``run`` computes the outputs from the arguments."""

    @staticmethod
    def forward(ctx, run, *args):
        loss, grad_first, grad_second, *rest = run(*args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(grad_first, grad_second, *rest)
        ctx.save_for_backward(grad_first, grad_second, *args[:2])
        ctx.arguments = 1 + len(args)
        return loss, grad_first, grad_second, *rest

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * ctx.arguments
        *grads, first, second = ctx.saved_tensors
        # The saved gradients are float32 at least, so that a loss scale is applied before anything is rounded to half.
        grads = [
            (grad * grad_loss).to(x.dtype) if needed else None
            for grad, x, needed in zip(grads, (first, second), ctx.needs_input_grad[1:3], strict=True)
        ]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grads = [None if grad is None else _OnceDifferentiated.apply(grad, first, second) for grad in grads]
        return (None, *grads, *(None,) * (ctx.arguments - 3))


class _OnceDifferentiated(torch.autograd.Function):
    """A gradient that can be used, and that says why it cannot be differentiated.

    It hangs from the inputs of the loss, so that a derivative with respect to them, or to what they came from, passes
    here: ``once_differentiable`` would be walked around, and leave the second derivative silently zero.
    """

    @staticmethod
    def forward(ctx, grad, *inputs):
        return grad.clone()

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(NO_DOUBLE_BACKWARD)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def call(operator, implementation, *args):
    """The operator, or in eager mode what it comes to: the dispatcher's two detours through Python cost as much as a
    small batch's kernels."""
    if torch.compiler.is_compiling() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return operator(*args)
    # The backends made of torch's own operators carry tangents, unless a process group lies between (no name is last).
    carries = args[-1] in ("reference", "torch")
    if forward_ad._current_level >= 0 and not carries and any(map(_has_tangent, args[:2])):
        raise RuntimeError(NO_FORWARD_MODE)
    return _Rule.apply(implementation, *args) if _needs_grad(*args[:2]) else implementation(*args)


def register(name, implementation, fake) -> None:
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vrm_kernels::{name}", fake, lib=_library)
    operator = getattr(torch.ops.vrm_kernels, name).default

    def below_autograd(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    def autograd(*args):
        return _Rule.apply(below_autograd, *args) if _needs_grad(*args[:2]) else below_autograd(*args)

    _library.impl(name, autograd, "Autograd")


register(
    "relation_graph",
    _relation_graph_impl,
    lambda a, b, ta, tb, p, q, percentile, delta, exclude_self, need_grad, backend: relation_graph_fake(
        a, b, ta, tb, need_grad
    ),
)
register(
    "vrm_graphs",
    _vrm_graphs_impl,
    lambda s, v, t, u, alpha, beta, percentile, delta, complete, need_grad, backend: vrm_graphs_fake(
        s, v, t, u, need_grad
    ),
)
