"""The custom operators: schema, fake kernel, and the one autograd rule of every backend.

What a backend computes is :mod:`vrm_kernels.backends.contract`. ``reference`` is called as it is: plain differentiable
PyTorch, never wrapped in an operator.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vrm_kernels import backends, checks
from vrm_kernels.backends.contract import (
    GraphSettings,
    LossResult,
    LossSettings,
    Probs,
    Sides,
    Views,
    compute_dtype,
    empty_graph_result,
    empty_loss_result,
    with_cross_entropies,
)
from vrm_kernels.graph import pruning
from vrm_kernels.graph import zscore as zscores

NO_DOUBLE_BACKWARD = (
    "second derivatives of the VRM loss are not supported by this backend: use backend='reference', which supports them"
)
NO_FORWARD_MODE = (
    "forward-mode derivatives (torch.func.jvp, jacfwd, dual tensors) of the VRM loss are not supported by this "
    "backend: use backend='reference', which supports them, or reverse mode"
)

_REFERENCE = backends.REGISTRY["reference"].load()
_library = torch.library.Library("vrm_kernels", "FRAGMENT")
define = _library.define
define(
    "relation_graph(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor? probs_a, Tensor? probs_b, "
    "float percentile, float delta, float eps, bool exclude_self, bool need_grad, str backend) "
    "-> (Tensor loss, Tensor grad_a, Tensor grad_b, Tensor kept)"
)
LOSS_ARGUMENTS = (
    "Tensor student_real, Tensor student_virtual, Tensor teacher_real, Tensor teacher_virtual, Tensor? labels, "
    "Tensor? class_weight, Tensor? weights, float alpha, float beta, bool ce_real, bool ce_virtual, float percentile, "
    "float delta, float eps, bool complete, float label_smoothing, int ignore_index, bool zscore, bool need_grad, "
    "str backend"
)
LOSS_RESULTS = "(Tensor loss, Tensor grad_real, Tensor grad_virtual, Tensor terms, Tensor kept)"
define(f"vrm_loss({LOSS_ARGUMENTS}) -> {LOSS_RESULTS}")


# ---- what the public functions call ---------------------------------------------------------------------------------


def relation_graph(sides: Sides, probs: Probs | None, settings: GraphSettings, backend: str) -> Tensor:
    """The loss of one graph on ``backend`` (a registered name, not "auto")."""
    sides = Sides(sides.a, sides.b, sides.teacher_a.detach(), sides.teacher_b.detach())
    if settings.percentile == 100:
        probs = None
    if backend == "reference":
        with without_autocast(sides.a.device.type):
            sides = Sides(sides.a, sides.b, *map(_outside_inference, sides[2:]))
            return _REFERENCE.relation_graph(sides, probs, settings, False).loss
    p, q = (None, None) if probs is None else probs
    arguments = *sides, p, q, *settings, needs_grad(sides.a, sides.b), backend
    return call(torch.ops.vrm_kernels.relation_graph, _relation_graph, backend, arguments)[0]


def vrm_loss(
    views: Views,
    labels: Tensor | None,
    class_weight: Tensor | None,
    weights: Tensor | None,
    settings: LossSettings,
    zscore: bool,
    backend: str,
) -> LossResult:
    """The whole loss on ``backend``; ``weights`` ``[2]``, if given, stands for alpha and beta of ``settings``. Only
    ``loss`` of the result is differentiable. With ``zscore`` the relations, and the entropies that rank them, are those
    of the logits' z-scores."""
    real, virtual, teacher_real, teacher_virtual = views
    views = Views(real, virtual, teacher_real.detach(), teacher_virtual.detach())
    if backend == "reference":
        with without_autocast(real.device.type):
            views = Views(real, virtual, *map(_outside_inference, views[2:]))
            labels, class_weight = (None if x is None else _outside_inference(x) for x in (labels, class_weight))
            if weights is not None:  # traced by the compiler, as everything of this backend
                settings = settings._replace(alpha=weights[0], beta=weights[1])  # type: ignore[arg-type]
            return _loss(_REFERENCE, views, labels, class_weight, settings, zscore, False)
    arguments = *views, labels, class_weight, weights, *settings, zscore, needs_grad(real, virtual), backend
    return LossResult(*call(torch.ops.vrm_kernels.vrm_loss, _vrm_loss, backend, arguments))


def quantile(x: Tensor, q: float | Tensor) -> Tensor:
    """The exact quantile of 1-D float32 or float64 ``x``: selection on the CPU where it is built, else a sort."""
    if x.device.type == "cpu" and backends.REGISTRY["cpp"].status()[0]:
        from vrm_kernels.backends.cpp.backend import quantile as selected

        return selected(x, *pruning.ranks(q, x.numel(), x))
    return pruning.quantile_sorted(x, q)


def _outside_inference(x: Tensor) -> Tensor:
    """What autograd can save: not a tensor that torch.inference_mode made."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def without_autocast(device_type: str):
    """Relations and norms are float32 whatever the surrounding autocast says."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# ---- the operators --------------------------------------------------------------------------------------------------


def _relation_graph(a, b, teacher_a, teacher_b, p, q, percentile, delta, eps, exclude_self, need_grad, backend):
    probs = None if p is None else (p, q)
    settings = GraphSettings(percentile, delta, eps, exclude_self)
    with without_autocast(a.device.type):
        chosen = backends.REGISTRY[backend].load()
        return tuple(chosen.relation_graph(Sides(a, b, teacher_a, teacher_b), probs, settings, need_grad))


def settings_of(weights: Tensor | None, values: tuple) -> LossSettings:
    """The settings of an operator from its arguments ``weights, alpha, ..., ignore_index``."""
    settings = LossSettings(*values)
    if weights is None:
        return settings
    alpha, beta, _ = checks.check_weights(*weights.tolist())
    return settings._replace(alpha=alpha, beta=beta)


def _vrm_loss(real, virtual, teacher_real, teacher_virtual, labels, class_weight, weights, *rest):
    *values, zscore, need_grad, backend = rest
    settings = settings_of(weights, values)
    views = Views(real, virtual, teacher_real, teacher_virtual)
    with without_autocast(real.device.type):
        chosen = backends.REGISTRY[backend].load()
        return tuple(_loss(chosen, views, labels, class_weight, settings, zscore, need_grad))


def _loss(
    chosen: backends.Backend,
    views: Views,
    labels: Tensor | None,
    class_weight: Tensor | None,
    settings: LossSettings,
    zscore: bool,
    need_grad: bool,
) -> LossResult:
    if not zscore:
        return chosen.vrm_loss(views, labels, class_weight, settings, need_grad)
    # The backend computes the relations of the z-scores, and the cross-entropies are added beside it.
    dtype = compute_dtype(*views)
    views = Views(*(x.to(dtype) for x in views))
    without = settings._replace(ce_real=False, ce_virtual=False)
    relations = chosen.vrm_loss(Views(*map(zscores.zscore, views)), None, None, without, need_grad)
    if need_grad:
        relations = relations._replace(
            grad_real=zscores.zscore_backward(relations.grad_real, views.student_real),
            grad_virtual=zscores.zscore_backward(relations.grad_virtual, views.student_virtual),
        )
    relations = relations._replace(terms=relations.terms[2:])
    return with_cross_entropies(relations, views, labels, class_weight, settings, need_grad)


# ---- the one autograd rule ------------------------------------------------------------------------------------------


class _Rule(torch.autograd.Function):
    """The first two inputs of both operators are the student's. Their first output is the loss, the next two are its
    gradients, which backward only scales. ``run`` computes the outputs from the arguments."""

    @staticmethod
    def forward(run, *args):
        return tuple(run(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *args = inputs
        _, grad_first, grad_second, *rest = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(grad_first, grad_second, *rest)
        ctx.save_for_backward(grad_first, grad_second, *args[:2])
        ctx.arguments = 1 + len(args)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * ctx.arguments
        *grads, first, second = ctx.saved_tensors
        scale = not _is_one(grad_loss)
        # The saved gradients are float32 at least, so that a loss scale is applied before anything is rounded to half.
        grads = [
            (grad * grad_loss if scale else grad).to(x.dtype) if needed else None
            for grad, x, needed in zip(grads, (first, second), ctx.needs_input_grad[1:3], strict=True)
        ]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grads = [None if grad is None else _OnceDifferentiated.apply(grad, first, second) for grad in grads]
        return (None, *grads, *(None,) * (ctx.arguments - 3))

    @staticmethod
    def vmap(info, in_dims, run, *args):
        """One loss after the other: an ensemble's are as many kernels' work as its members."""
        results = []
        for k in range(info.batch_size):
            one = (x if d is None else x.select(d, k) for x, d in zip(args, in_dims[1:], strict=True))
            results.append(_Rule.apply(run, *one))
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


class _EagerRule(_Rule):
    """The same where no transform of torch.func is active: beside a ``setup_context`` of its own ``Function.apply``
    inspects the signature of ``forward`` on every call, which takes a fifth of a step's time on the host. It looks at
    every argument, too: those that get no gradient are one."""

    @staticmethod
    def forward(ctx, run, first, second, others):
        output = tuple(run(first, second, *others))
        _Rule.setup_context(ctx, (run, first, second, others), output)
        return output

    setup_context = staticmethod(torch.autograd.Function.setup_context)


class _OnceDifferentiated(torch.autograd.Function):
    """A gradient that can be used, and that says why it cannot be differentiated.

    It hangs from the inputs of the loss, so that a derivative with respect to them, or to what they came from, passes
    here: ``once_differentiable`` would be walked around, and leave the second derivative silently zero.
    """

    @staticmethod
    def forward(grad, *inputs):
        return grad.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, grad, *inputs):
        return grad.clone(), in_dims[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(NO_DOUBLE_BACKWARD)


def _is_one(grad_loss: Tensor) -> bool:
    """Whether the upstream gradient is 1, as of ``loss.backward()``, and that is known without waiting: on the CPU,
    where nothing traces or batches."""
    return (
        type(grad_loss) is Tensor
        and grad_loss.device.type == "cpu"
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.compiler.is_compiling()
        and grad_loss.item() == 1
    )


def _is_batched(args: tuple) -> bool:
    """Whether torch.func.vmap is over any of the tensors."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x) for x in args)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def call(operator: Callable, implementation: Callable, backend: str | None, args: tuple) -> tuple[Tensor, ...]:
    """Calls the operator, or in eager mode what the operator would call: the dispatcher's two detours through Python
    cost as much as a small batch's kernels. ``backend`` decides whether forward-mode derivatives pass."""
    if torch.compiler.is_compiling() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return operator(*args)
    if (
        forward_ad._current_level >= 0
        and any(map(_has_tangent, args[:2]))
        and (backend is None or not backends.REGISTRY[backend].load().carries_tangents)
    ):
        raise RuntimeError(NO_FORWARD_MODE)
    if not needs_grad(*args[:2]) and not _is_batched(args):
        return implementation(*args)
    if torch._C._are_functorch_transforms_active():
        return _Rule.apply(implementation, *args)
    return _EagerRule.apply(implementation, *args[:2], args[2:])


def register(name, implementation, fake) -> None:
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vrm_kernels::{name}", fake, lib=_library)
    operator = getattr(torch.ops.vrm_kernels, name).default

    def below_autograd(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    def autograd(*args):
        return _Rule.apply(below_autograd, *args) if needs_grad(*args[:2]) else below_autograd(*args)

    _library.impl(name, autograd, "Autograd")


register(
    "relation_graph",
    _relation_graph,
    lambda a, b, ta, tb, p, q, *rest: tuple(empty_graph_result(Sides(a, b, ta, tb), need_grad=rest[-2])),
)
register(
    "vrm_loss",
    _vrm_loss,
    lambda s, v, t, u, labels, weight, *rest: tuple(empty_loss_result(Views(s, v, t, u), need_grad=rest[-2])),
)
