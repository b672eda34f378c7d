"""A process's share of the two relation graphs of a global batch: which edges it has, which logits of the other
processes it needs for them, and which gradients it sends back.

With ``relations="inter_view"`` (:class:`InterView`) an edge joins a real and a virtual view. A share takes its own
samples' real views with all virtual views, and the real view of a block of classes with all classes' virtual view. It
needs its own rows and its own columns of the real views, and all of the virtual views. With ``relations="complete"``
(:class:`Complete`) any two vertices are joined, and everything is needed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vrm_kernels.backends.contract import Backend, LossSettings, Probs, ShareSettings, Sides, Views
from vrm_kernels.distributed.collectives import Group
from vrm_kernels.graph import forms, pruning, selection

# A share's joint entropies are stored up to this size; larger ones are computed again for every pass.
STORED_ENTROPY_BYTES = 72 << 20
STORED_ENTROPY_BYTES_GPU = 1 << 30
ROWS_MULTIPLE = 128  # a block has a multiple of this many rows, because products are cut so


class Share:
    """Some vertices of one graph against all of them.

    Args:
        rows: how many vertices are the share's own.
        first: how many come before them in the shares of other processes.
        vertices: how many there are on the other side.
        probs: ``(P [rows, K], log(P' + 1e-7) [vertices, K])``, or ``None`` where every edge is kept.
        exclude_self: whether both sides are one set of vertices, the share's own first.
    """

    def __init__(self, backend: Backend, rows: int, first: int, vertices: int, probs: Probs | None, exclude_self: bool):
        self.backend, self.rows, self.first, self.vertices = backend, rows, first, vertices
        self.exclude_self = exclude_self
        self.edges = pruning.edge_count(vertices, vertices, exclude_self)
        self.probs = probs
        self.entropy: Tensor | None = None
        self.step = max(1, rows)
        if probs is not None and rows > 0:
            size = rows * vertices * probs[0].element_size()
            stored = STORED_ENTROPY_BYTES if probs[0].device.type == "cpu" else STORED_ENTROPY_BYTES_GPU
            if size <= stored:
                self.entropy = self._entropies(probs, 0, rows)
            else:
                step = max(1, stored * rows // size)
                self.step = step // ROWS_MULTIPLE * ROWS_MULTIPLE or step

    def _entropies(self, probs: Probs, begin: int, end: int) -> Tensor:
        entropy = self.backend.entropy_of_logs(probs[0][begin:end], probs[1])
        if self.exclude_self:  # a vertex with itself: behind every ranked edge
            entropy.diagonal(begin).fill_(torch.inf)
        return entropy

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and the entropies of their edges: all of them if they are stored."""
        assert self.probs is not None
        for begin in range(0, self.rows, self.step):
            end = min(self.rows, begin + self.step)
            yield slice(begin, end), self._entropies(self.probs, begin, end) if self.entropy is None else self.entropy

    def count_digits(self, prefixes: Tensor, shift: int, bits: int) -> Tensor:
        """As :func:`vrm_kernels.graph.selection.count_digits`, of the share's joint entropies."""
        if self.entropy is not None:
            return self.backend.count_digits(self.entropy, prefixes, shift, bits)
        counts = prefixes.new_zeros(len(prefixes), 2**bits)
        for _, entropy in self._blocks():
            counts += self.backend.count_digits(entropy, prefixes, shift, bits)
        return counts

    def sample(self) -> Tensor:
        """``[forms.sample(edges)]`` joint entropies of the graph, zero where another share has the edge. They need not
        have the bits that the other methods see."""
        assert self.probs is not None
        p, logs = self.probs
        size = forms.sample(self.edges)
        sample = p.new_zeros(size)
        slots = slice(*(size * row // self.vertices for row in (self.first, self.first + self.rows)))
        own = sample[slots]
        i, j = selection.places(slots, self.rows, self.vertices)
        if self.entropy is not None:
            own.copy_(self.entropy[i, j])
            return sample
        for k in range(0, len(own), ROWS_MULTIPLE):
            some = slice(k, k + ROWS_MULTIPLE)
            own[some] = -(p[i[some]] * logs[j[some]]).sum(1)
        if self.exclude_self:
            own.masked_fill_(i == j, torch.inf)
        return sample

    def split(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """``(counts [5] int64, inside [1, n])``: how many of the share's joint entropies are below a bracket, at its
        low end, inside, and at its high end, then 1 if those inside are too many to be collected; and those inside."""
        assert self.probs is not None
        room = forms.room(self.edges) if self.entropy is None else self.edges
        outside, found = torch.zeros(3, dtype=torch.int64), 0
        inside = [self.probs[0].new_empty(0)]
        for _, entropy in self._blocks():
            counts, part = self.backend.split(entropy, low, high)
            outside += counts
            found += len(part)
            if found <= room:
                inside.append(part)
        below, at_low, at_high = outside.tolist()
        return torch.tensor([below, at_low, found, at_high, found > room]), torch.cat(inside)[None]

    def loss(self, sides: Sides, settings: ShareSettings, grads: Sequence[Tensor]) -> Tensor:
        """The share's part of the graph's loss: see :meth:`vrm_kernels.backends.contract.Backend.relation_share`."""
        if self.rows == 0:
            return sides.a.new_zeros(())
        if self.probs is None or (self.entropy is None and self.backend.recomputes_entropy):
            return self.backend.relation_share(sides, self.probs, None, settings, grads)
        a, b, teacher_a, teacher_b = sides
        loss = a.new_zeros(())
        settings = settings._replace(exclude_self=False)  # the infinite entropies exclude them
        for rows, entropy in self._blocks():
            part = Sides(a[rows], b, teacher_a[rows], teacher_b)
            into = (grads[0][rows], grads[1]) if grads else ()
            loss += self.backend.relation_share(part, None, entropy, settings, into)
        return loss


class Limits(NamedTuple):
    """What prunes the inter-sample and the inter-class graph of the global batch."""

    thresholds: Tensor  # [2], of the joint entropies
    kept: Tensor  # [2] int64


def _share_settings(share: Share, limits: Limits, settings: LossSettings, by_class: int) -> ShareSettings:
    weight = settings.beta if by_class else settings.alpha
    threshold, kept = limits.thresholds[by_class], limits.kept[by_class]
    return ShareSettings(threshold, kept, share.edges, weight, settings.delta, settings.eps, share.exclude_self)


Wait = Callable[[], list[Tensor]]


class InterView:
    """Shares of graphs whose edges join the views.

    Args:
        views: this process's rows of the student's logits of the real and the virtual view, then the teacher's.
        dtype: to compute in.
        ranked: whether edges are pruned, and joint entropies needed.
    """

    def __init__(self, group: Group, backend: Backend, views: Views, dtype: torch.dtype, ranked: bool):
        real, virtual, teacher_real, teacher_virtual = views
        self.group, self.dtype = group, dtype
        self.real, self.teacher_real = real.to(dtype), teacher_real.to(dtype)
        # Everything is on its way at once, in the order of its use.
        wait_virtual = group.start_gather_rows(virtual)
        wait_probs, probs = None, None
        if ranked:
            probs = self.real.softmax(1)
            wait_probs = group.start_swap_columns(probs)
        self.waits = (
            group.start_swap_columns(real),
            group.start_swap_columns(teacher_real),
            group.start_gather_rows(teacher_virtual),
        )
        self.virtual = wait_virtual().to(dtype)
        samples, classes = self.virtual.shape
        by_sample = by_class = None
        if probs is not None and wait_probs is not None:
            logs = pruning.log_probs(self.virtual.softmax(1), inplace=True)
            by_sample, by_class = (probs, logs), (wait_probs().t(), logs.t())
        block = group.share_of(classes)
        self.shares = (
            Share(backend, len(real), group.own_rows().start, samples, by_sample, False),
            Share(backend, block.stop - block.start, block.start, classes, by_class, False),
        )

    def losses(self, limits: Limits, settings: LossSettings, need_grad: bool) -> tuple[list[Tensor], Wait]:
        """The shares' losses, and a function that waits and returns the gradients of this process's rows, or none."""
        block, teacher_block, teacher_virtual = (wait().to(self.dtype) for wait in self.waits)
        by_sample, by_class = (_share_settings(x, limits, settings, k) for k, x in enumerate(self.shares))
        samples = Sides(self.real, self.virtual, self.teacher_real, teacher_virtual)
        classes = Sides(block.t(), self.virtual.t(), teacher_block.t(), teacher_virtual.t())
        if not need_grad:
            return [self.shares[0].loss(samples, by_sample, ()), self.shares[1].loss(classes, by_class, ())], list
        grad_block, grad_virtual, grad_real = (torch.zeros_like(x) for x in (block, self.virtual, self.real))
        # The classes first: their gradients travel while the samples' are computed.
        of_classes = self.shares[1].loss(classes, by_class, (grad_block.t(), grad_virtual.t()))
        wait_block = self.group.start_return_columns(grad_block, grad_real)
        of_samples = self.shares[0].loss(samples, by_sample, (grad_real, grad_virtual))
        wait_virtual = self.group.start_sum_rows(grad_virtual)
        return [of_samples, of_classes], lambda: [wait_block(), wait_virtual()]


class Complete:
    """Shares of graphs over the vertices of both views together: see :class:`InterView`."""

    def __init__(self, group: Group, backend: Backend, views: Views, dtype: torch.dtype, ranked: bool):
        self.group, self.dtype = group, dtype
        waits = [group.start_gather_rows(x) for x in views]
        self.student, self.waits = [wait().to(dtype) for wait in waits[:2]], waits[2:]
        samples, classes = self.student[0].shape
        self.blocks = group.own_rows(), group.share_of(classes)
        self.orders = [self._own_first(n, block) for n, block in zip((samples, classes), self.blocks, strict=True)]
        probs = [x.softmax(1) for x in self.student] if ranked else []
        logs = [pruning.log_probs(p) for p in probs]
        self.shares = []
        for by_class, n in enumerate((samples, classes)):
            first = 2 * self.blocks[by_class].start
            own = 2 * self.blocks[by_class].stop - first
            ranking = (self._vertices(probs, by_class)[:own], self._vertices(logs, by_class)) if ranked else None
            self.shares.append(Share(backend, own, first, 2 * n, ranking, True))

    def _own_first(self, n: int, block: slice) -> Tensor:
        """The order in which the share's own vertices, of both views, come before the others: then the edge of a vertex
        with itself is an edge (i, i)."""
        index = torch.arange(n, device=self.student[0].device)
        own = index[block]
        others = torch.cat((index[: block.start], index[block.stop :]))
        return torch.cat((own, own + n, others, others + n))

    def _vertices(self, views: Sequence[Tensor], by_class: int) -> Tensor:
        return torch.cat([x.t() if by_class else x for x in views])[self.orders[by_class]]

    def losses(self, limits: Limits, settings: LossSettings, need_grad: bool) -> tuple[list[Tensor], Wait]:
        """As :meth:`InterView.losses`."""
        teacher = [wait().to(self.dtype) for wait in self.waits]
        grads = [torch.zeros_like(x) for x in self.student] if need_grad else []
        losses = []
        for by_class, share in enumerate(self.shares):
            students, teachers = (self._vertices(views, by_class) for views in (self.student, teacher))
            own = students[: share.rows]
            into = [torch.zeros_like(own), torch.zeros_like(students)] if need_grad else []
            sides = Sides(own, students, teachers[: share.rows], teachers)
            losses.append(share.loss(sides, _share_settings(share, limits, settings, by_class), into))
            if need_grad:
                into[1][: share.rows] += into[0]
                both = torch.empty_like(into[1])
                both[self.orders[by_class]] = into[1]
                for grad, part in zip(grads, both.chunk(2), strict=True):
                    grad += part.t() if by_class else part
        waits = [self.group.start_sum_rows(x) for x in grads]
        return losses, lambda: [wait() for wait in waits]
