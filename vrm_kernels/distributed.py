r"""The loss of the global batch of a process group (arXiv 2502.20760 has one process; this is the same function of the
concatenated batches).

Every process gathers the logits, computes a *share* of each graph, and gets back the gradient of its own rows:

- of the inter-sample graph the edges of its own samples' real views with all virtual views, of the inter-class graph
  those of a block of classes with all classes (with ``relations="complete"``: of its own vertices, in both views);
- the threshold is the exact quantile over the global graph, from summed counts of digits, see
  :mod:`vrm_kernels.selection`;
- gradients of the other processes' rows are summed over the processes on the way back.

The gradient is multiplied by the number of processes, because DistributedDataParallel and FSDP average gradients over
the processes, and averaging the share that each process's rows have in the global loss would divide it by that number.

What a backend module gives for this, beside :mod:`vrm_kernels.ops`'s contract::

    entropy_of_logs(P [m, K], L' [N, K]) -> [m, N]              as vrm_kernels.pruning.entropy_of_logs
    count_digits(entropy [m, N], prefixes, shift, bits)         as vrm_kernels.selection.count_digits
    relation_share(a [m, D], b [N, D], teacher_a, teacher_b, probs | None, entropy | None, threshold, kept, edges,
                   weight, delta, exclude_self, grads) -> loss []

The loss is the sum over the share's edges at or below ``threshold``, over ``kept``, both of the whole graph (of so
many ``edges``) and on the device; ``weight`` times its gradients is added to ``grads``, two matrices of any strides or
none. ``entropy`` is what entropy_of_logs gave, infinite where an edge does not exist; where it is ``None``, every edge
is kept, but for the edges (i, i) with ``exclude_self``. All matrices have one dtype, float32 or float64.

Entropies that are too many to be stored are computed again, a block of rows at a time: by the same calls, so that they
are the same bits, and relation_share is called for each block. A module whose ``RECOMPUTES_ENTROPY`` is true does so
itself, because its entropy_of_logs gives the same bits for any block of rows: relation_share is called once, with
``probs``, (P, L'), and without ``entropy``. Nothing here waits for a GPU, but for the batch sizes.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from vrm_kernels import backends, ops, pruning, selection
from vrm_kernels.collectives import Group, tensor_on

# A share's joint entropies are stored up to here, and beyond it computed again for every pass.
STORED_ENTROPY_BYTES = 72 << 20
STORED_ENTROPY_BYTES_GPU = 1 << 30
ROWS_MULTIPLE = 128  # of a block of rows: what products are cut into
RELATION_TERMS = 2

ops.define(
    "vrm_graphs_distributed(Tensor student_real, Tensor student_virtual, Tensor teacher_real, Tensor teacher_virtual, "
    "Tensor local_sums, float alpha, float beta, float percentile, float delta, bool complete, bool need_grad, "
    "str backend, str group, str[] setting_names, float[] settings) "
    "-> (Tensor loss, Tensor grad_real, Tensor grad_virtual, Tensor terms, Tensor kept, Tensor global_sums)"
)


def vrm_graphs(
    student_real, student_virtual, teacher_real, teacher_virtual, local_sums, *, alpha, beta, percentile, delta,
    complete, backend, group, settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(alpha L_inter_sample + beta L_inter_class, the two terms [2], the two kept counts [2], global_sums)`` of the
    global batch; the same on every process.

    Args:
        local_sums: float64 ``[K]``, to be summed over the processes.
        group: name of the process group.
        settings: further numbers in which the processes must agree, by name.
    """
    views = (student_real, student_virtual, teacher_real.detach(), teacher_virtual.detach())
    need_grad = torch.is_grad_enabled() and (student_real.requires_grad or student_virtual.requires_grad)
    arguments = (
        *views, local_sums, alpha, beta, percentile, delta, complete, need_grad, backend, group, list(settings),
        [float(x) for x in settings.values()],
    )  # fmt: skip
    loss, _, _, terms, kept, sums = ops.call(torch.ops.vrm_kernels.vrm_graphs_distributed, _implementation, *arguments)
    return loss, terms, kept, sums


def _implementation(
    s, v, t, u, local_sums, alpha, beta, percentile, delta, complete, need_grad, backend, group_name, names, settings
):  # fmt: skip
    group = Group(group_name)
    module = backends.REGISTRY[backend].load()
    dtype = ops.compute_dtype(s, v, t, u)
    settings = dict(zip(names, settings, strict=True))
    settings |= {"alpha": alpha, "beta": beta, "unreliable_pruning_percentile": percentile, "delta": delta}
    settings |= {"relations='complete'": complete, "gradients enabled": need_grad}
    _agree(group, (s, v, t, u), settings)

    with torch.no_grad(), ops.without_autocast(s.device.type):
        waits = [group.start_gather(x.detach()) for x in (s, v, t, u)]
        student = [wait().to(dtype) for wait in waits[:2]]
        probs = None if percentile == 100 else _probs_and_logs(*student, complete)
        # The teacher's logits arrive while the entropies, which are the student's, are computed and ranked.
        blocks = group.own_rows(), group.share_of(s.shape[1])
        shares = [_Share(module, student, probs, block, k == 1, complete) for k, block in enumerate(blocks)]
        thresholds, kept = _thresholds(group, shares, percentile, dtype)
        teacher = [wait().to(dtype) for wait in waits[2:]]
        grads = [torch.zeros_like(x) for x in student] if need_grad else []
        losses = [
            share.loss(student, teacher, thresholds[k], kept[k], (alpha, beta)[k], delta, grads)
            for k, share in enumerate(shares)
        ]
        waits = [group.start_scatter(grad) for grad in grads]
        sums = group.sum(torch.cat((torch.stack(losses).double(), local_sums)), "sum of the loss")
        terms, global_sums = sums.split((RELATION_TERMS, len(local_sums)))
        loss = (alpha * terms[0] + beta * terms[1]).to(dtype)
        # A process that saw a number that is not finite poisons the gradients of all.
        factor = group.world + loss * 0
        grads = [wait() * factor for wait in waits] or [loss.new_empty(0), loss.new_empty(0)]
        return loss, *grads, terms.to(dtype, copy=True), kept, global_sums.clone()


def _agree(group: Group, views: tuple[Tensor, ...], settings: dict[str, float]) -> None:
    """Learns the batch sizes.

    Raises:
        ValueError: on every process, if they differ in anything but their batch's size, or all batches are empty.
    """
    names = ("student_real", "student_virtual", "teacher_real", "teacher_virtual")
    dtypes = {f"dtype of logits_{name}": ops.DTYPES.index(x.dtype) for name, x in zip(names, views, strict=True)}
    batch, classes = views[0].shape
    settings = {"number of classes": classes, **dtypes, **settings}
    values = group.exchange([batch, *map(float, settings.values())], views[0].device)
    for k, name in enumerate(settings, start=1):
        of = [row[k] for row in values]
        other = next((r for r, x in enumerate(of) if x != of[0]), None)
        if other is not None:
            shown = [ops.DTYPES[int(x)] if name in dtypes else f"{x:g}" for x in (of[0], of[other])]
            raise ValueError(
                f"gather_distributed=True: the processes of the group differ in {name}: rank 0 has {shown[0]}, rank "
                f"{other} has {shown[1]}. All must give logits of the same classes and dtypes and the same settings"
            )
    group.sizes = [int(row[0]) for row in values]
    if sum(group.sizes) == 0:
        raise ValueError("gather_distributed=True: the batch of every process of the group is empty")


def _probs_and_logs(real: Tensor, virtual: Tensor, complete: bool) -> tuple[list[Tensor], list[Tensor]]:
    """P and log(P' + 1e-7) of both views, where both are needed."""
    probs = [x.softmax(1) for x in (real, virtual)]
    if complete:
        return probs, [pruning.log_probs(p) for p in probs]
    # The virtual view's are needed for their logarithms alone, the real view's for themselves.
    logs = pruning.log_probs(probs[1])
    return [probs[0], logs], [logs, logs]


class _Share:
    """A process's part of one graph: the vertices in ``block`` against all."""

    def __init__(self, module: ModuleType, student, probs, block: slice, by_class: bool, complete: bool):
        self.module, self.block, self.by_class, self.complete = module, block, by_class, complete
        self.device = student[0].device
        n = student[0].shape[1 if by_class else 0]
        self.vertices = 2 * n if complete else n
        self.edges = pruning.edge_count(self.vertices, self.vertices, complete)
        self.order = self._own_first(n, student[0].device) if complete else None
        self.probs = None if probs is None else tuple(self._sides(x)[side] for side, x in enumerate(probs))
        self.entropy = None
        rows = (block.stop - block.start) * (2 if complete else 1)
        self.rows, self.step = rows, max(1, rows)
        if self.probs is not None and rows > 0:
            size, stored = rows * self.vertices * student[0].element_size(), _stored_bytes(self.device)
            if size <= stored:
                self.entropy = self._entropies(0, rows)
            else:
                step = max(1, stored * rows // size)
                self.step = step // ROWS_MULTIPLE * ROWS_MULTIPLE or step

    def _own_first(self, n: int, device) -> Tensor:
        """The stacked vertices of both views, the share's own before the others: so an edge of a vertex with itself is
        an edge (i, i)."""
        index = torch.arange(n, device=device)
        own = index[self.block]
        others = torch.cat((index[: self.block.start], index[self.block.stop :]))
        return torch.cat((own, own + n, others, others + n))

    def _sides(self, views) -> tuple[Tensor, Tensor]:
        """Side a, the share's vertices, and side b, all, of ``[B, C]`` matrices of the two views."""
        real, virtual = (x.t() if self.by_class else x for x in views)
        if not self.complete:
            return real[self.block], virtual
        both = torch.cat((real, virtual))[self.order]
        return both[: 2 * (self.block.stop - self.block.start)], both

    def _entropies(self, begin: int, end: int) -> Tensor:
        entropy = self.module.entropy_of_logs(self.probs[0][begin:end], self.probs[1])
        if self.complete:  # a vertex with itself: behind every ranked edge
            entropy.diagonal(begin).fill_(torch.inf)
        return entropy

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and the entropies of their edges: all of them if they are stored."""
        for begin in range(0, self.rows, self.step):
            end = min(self.rows, begin + self.step)
            yield slice(begin, end), self._entropies(begin, end) if self.entropy is None else self.entropy

    def count_digits(self, prefixes: Tensor, shift: int, bits: int) -> Tensor:
        if self.entropy is not None:
            return self.module.count_digits(self.entropy, prefixes, shift, bits)
        counts = prefixes.new_zeros(len(prefixes), 2**bits)
        for _, entropy in self._blocks():
            counts += self.module.count_digits(entropy, prefixes, shift, bits)
        return counts

    def loss(self, student, teacher, threshold, kept, weight: float, delta: float, grads) -> Tensor:
        """This share's part of the graph's loss; adds ``weight`` times its gradients to those of all rows."""
        if self.rows == 0:
            return student[0].new_zeros(())
        sides = *self._sides(student), *self._sides(teacher)
        into = ()
        if grads:
            views = [x.t() if self.by_class else x for x in grads]
            if self.complete:
                into = [torch.zeros_like(x) for x in sides[:2]]
            else:
                into = views[0][self.block], views[1]
        settings = threshold, kept, self.edges, weight, delta
        recomputes = self.entropy is None and getattr(self.module, "RECOMPUTES_ENTROPY", False)
        if self.probs is None or recomputes:
            loss = self.module.relation_share(*sides, self.probs, None, *settings, self.complete, into)
        else:
            a, b, teacher_a, teacher_b = sides
            loss = a.new_zeros(())
            for rows, entropy in self._blocks():  # their infinite entropies exclude a vertex with itself
                part = a[rows], b, teacher_a[rows], teacher_b
                loss += self.module.relation_share(
                    *part, None, entropy, *settings, False, (into[0][rows], into[1]) if into else ()
                )
        if grads and self.complete:
            into[1][: self.rows] += into[0]
            both = torch.empty_like(into[1])
            both[self.order] = into[1]
            for view, part in zip(views, both.chunk(2), strict=True):
                view += part
        return loss


def _stored_bytes(device: torch.device) -> int:
    return STORED_ENTROPY_BYTES if device.type == "cpu" else STORED_ENTROPY_BYTES_GPU


def _thresholds(group: Group, shares: list[_Share], percentile: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(thresholds, kept)`` of the global graphs: the exact quantiles of their joint entropies, and how many edges are
    at or below them."""
    device = shares[0].device
    if percentile == 100:
        kept = tensor_on(device, [share.edges for share in shares], torch.int64)
        return torch.full((len(shares),), torch.inf, dtype=dtype, device=device), kept
    positions = [pruning.rank(percentile / 100, share.edges, dtype) for share in shares]
    # A rank that is whole does not look at the next value, which may be infinite.
    ranks = tensor_on(device, [[below, below + (weight > 0)] for below, weight in positions], torch.int64)
    weights = tensor_on(device, [weight for _, weight in positions], dtype)

    def count(prefixes: Tensor, shift: int, bits: int) -> Tensor:
        counts = torch.stack([share.count_digits(p, shift, bits) for share, p in zip(shares, prefixes, strict=True)])
        return group.sum(counts, "sum of the counts of entropies")

    largest = max(share.edges for share in shares) * torch.finfo(dtype).bits // 8 // group.world
    # The kernels of GPUs count narrow digits alone.
    wide = device.type == "cpu" and largest > STORED_ENTROPY_BYTES
    values, at_most = selection.order_statistics(count, ranks, dtype, wide_digits=wide)
    low, high = values.unbind(1)
    threshold = low.lerp(high, weights)
    return threshold, torch.where(threshold >= high, at_most[:, 1], at_most[:, 0])


def _fake(s, v, t, u, local_sums, need_grad):
    return *ops.vrm_graphs_fake(s, v, t, u, need_grad), torch.empty_like(local_sums)


ops.register(
    "vrm_graphs_distributed",
    _implementation,
    lambda s, v, t, u, sums, alpha, beta, percentile, delta, complete, need_grad, backend, group, names, settings: (
        _fake(s, v, t, u, sums, need_grad)
    ),
)
