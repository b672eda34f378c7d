"""A process's share of the two relation graphs of a global batch: which edges, what it needs of the other processes'
logits for them, and what it sends back of their gradients.

With ``relations="inter_view"`` (:class:`InterView`) an edge joins a real and a virtual view. A share takes its own
samples' real views with all virtual views, and the real view of a block of classes with all classes' virtual view: of
the real views it needs its own rows and its own columns, of the virtual views everything. With ``relations="complete"``
(:class:`Complete`) any two vertices are joined, and everything is needed.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from vrm_kernels.distributed.collectives import Group
from vrm_kernels.graph import pruning

# A share's joint entropies are stored up to here, and beyond it computed again for every pass.
STORED_ENTROPY_BYTES = 72 << 20
STORED_ENTROPY_BYTES_GPU = 1 << 30
ROWS_MULTIPLE = 128  # of a block of rows: what products are cut into


class Share:
    """Some vertices of one graph against all of them.

    Args:
        rows: how many vertices are the share's own.
        vertices: how many there are on the other side.
        probs: ``(P [rows, K], log(P' + 1e-7) [vertices, K])``, or ``None`` where every edge is kept.
        exclude_self: whether both sides are one set of vertices, the share's own first.
    """

    def __init__(self, module: ModuleType, rows: int, vertices: int, probs, exclude_self: bool):
        self.module, self.rows, self.vertices, self.exclude_self = module, rows, vertices, exclude_self
        self.edges = pruning.edge_count(vertices, vertices, exclude_self)
        self.keep_all, self.probs, self.entropy = probs is None, probs, None
        self.step = max(1, rows)
        if probs is not None and rows > 0:
            size = rows * vertices * probs[0].element_size()
            stored = STORED_ENTROPY_BYTES if probs[0].device.type == "cpu" else STORED_ENTROPY_BYTES_GPU
            if size <= stored:
                self.entropy, self.probs = self._entropies(0, rows), None
            else:
                step = max(1, stored * rows // size)
                self.step = step // ROWS_MULTIPLE * ROWS_MULTIPLE or step

    def _entropies(self, begin: int, end: int) -> Tensor:
        entropy = self.module.entropy_of_logs(self.probs[0][begin:end], self.probs[1])
        if self.exclude_self:  # a vertex with itself: behind every ranked edge
            entropy.diagonal(begin).fill_(torch.inf)
        return entropy

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and the entropies of their edges: all of them if they are stored."""
        for begin in range(0, self.rows, self.step):
            end = min(self.rows, begin + self.step)
            yield slice(begin, end), self._entropies(begin, end) if self.entropy is None else self.entropy

    def count_digits(self, prefixes: Tensor, shift: int, bits: int) -> Tensor:
        """As :func:`vrm_kernels.graph.selection.count_digits`, of the share's joint entropies."""
        if self.entropy is not None:
            return self.module.count_digits(self.entropy, prefixes, shift, bits)
        counts = prefixes.new_zeros(len(prefixes), 2**bits)
        for _, entropy in self._blocks():
            counts += self.module.count_digits(entropy, prefixes, shift, bits)
        return counts

    def loss(self, sides: Sequence[Tensor], threshold, kept, weight: float, delta: float, grads) -> Tensor:
        """The share's part of the graph's loss; adds ``weight`` times its gradients to ``grads``, one a side or none.

        Args:
            sides: student ``[rows, D]`` and ``[vertices, D]``, teacher likewise.
        """
        if self.rows == 0:
            return sides[0].new_zeros(())
        settings = threshold, kept, self.edges, weight, delta
        recomputes = self.entropy is None and getattr(self.module, "RECOMPUTES_ENTROPY", False)
        if self.keep_all or recomputes:
            return self.module.relation_share(*sides, self.probs, None, *settings, self.exclude_self, grads)
        a, b, teacher_a, teacher_b = sides
        loss = a.new_zeros(())
        for rows, entropy in self._blocks():  # whose infinities exclude a vertex with itself
            part = a[rows], b, teacher_a[rows], teacher_b
            into = (grads[0][rows], grads[1]) if grads else ()
            loss += self.module.relation_share(*part, None, entropy, *settings, False, into)
        return loss


class InterView:
    """Shares of graphs whose edges join the views.

    Args:
        views: this process's rows of the student's logits of the real and the virtual view, then the teacher's.
        dtype: to compute in.
        ranked: whether edges are pruned, and joint entropies needed.
    """

    def __init__(self, group: Group, module: ModuleType, views: Sequence[Tensor], dtype: torch.dtype, ranked: bool):
        real, virtual, teacher_real, teacher_virtual = views
        self.group, self.dtype = group, dtype
        self.real, self.teacher_real = real.to(dtype), teacher_real.to(dtype)
        # Everything is on its way at once, in the order of its use.
        wait_virtual = group.start_gather_rows(virtual)
        probs = self.real.softmax(1) if ranked else None
        wait_probs = group.start_swap_columns(probs) if ranked else None
        self.waits = (
            group.start_swap_columns(real),
            group.start_swap_columns(teacher_real),
            group.start_gather_rows(teacher_virtual),
        )
        self.virtual = wait_virtual().to(dtype)
        samples, classes = self.virtual.shape
        by_sample = by_class = None
        if ranked:
            logs = pruning.log_probs(self.virtual.softmax(1), inplace=True)
            by_sample, by_class = (probs, logs), (wait_probs().t(), logs.t())
        block = group.share_of(classes)
        self.shares = (
            Share(module, len(real), samples, by_sample, False),
            Share(module, block.stop - block.start, classes, by_class, False),
        )

    def losses(self, thresholds, kept, weights, delta: float, need_grad: bool):
        """The shares' losses, and a function that waits and returns the gradients of this process's rows, or none."""
        block, teacher_block, teacher_virtual = (wait().to(self.dtype) for wait in self.waits)
        whole = self.virtual, teacher_virtual
        grad_block, grad_virtual, grad_real = (
            [torch.zeros_like(x) for x in (block, self.virtual, self.real)] if need_grad else [None] * 3
        )
        # The classes first: their gradients travel while the samples' are computed.
        sides = block.t(), whole[0].t(), teacher_block.t(), whole[1].t()
        into = (grad_block.t(), grad_virtual.t()) if need_grad else ()
        by_class = self.shares[1].loss(sides, thresholds[1], kept[1], weights[1], delta, into)
        wait_block = self.group.start_return_columns(grad_block, grad_real) if need_grad else None
        sides = self.real, whole[0], self.teacher_real, whole[1]
        into = (grad_real, grad_virtual) if need_grad else ()
        by_sample = self.shares[0].loss(sides, thresholds[0], kept[0], weights[0], delta, into)
        wait_virtual = self.group.start_sum_rows(grad_virtual) if need_grad else None

        def wait() -> list[Tensor]:
            return [wait_block(), wait_virtual()] if need_grad else []

        return [by_sample, by_class], wait


class Complete:
    """Shares of graphs over the vertices of both views together: see :class:`InterView`."""

    def __init__(self, group: Group, module: ModuleType, views: Sequence[Tensor], dtype: torch.dtype, ranked: bool):
        self.group, self.dtype = group, dtype
        waits = [group.start_gather_rows(x) for x in views]
        self.student, self.waits = [wait().to(dtype) for wait in waits[:2]], waits[2:]
        samples, classes = self.student[0].shape
        self.blocks = group.own_rows(), group.share_of(classes)
        self.orders = [self._own_first(n, block) for n, block in zip((samples, classes), self.blocks, strict=True)]
        probs = logs = None
        if ranked:
            probs = [x.softmax(1) for x in self.student]
            logs = [pruning.log_probs(p) for p in probs]
        self.shares = []
        for by_class, n in enumerate((samples, classes)):
            own = 2 * (self.blocks[by_class].stop - self.blocks[by_class].start)
            ranking = (self._vertices(probs, by_class)[:own], self._vertices(logs, by_class)) if ranked else None
            self.shares.append(Share(module, own, 2 * n, ranking, True))

    def _own_first(self, n: int, block: slice) -> Tensor:
        """The stacked vertices of both views, the share's own before the others: so an edge of a vertex with itself is
        an edge (i, i)."""
        index = torch.arange(n, device=self.student[0].device)
        own = index[block]
        others = torch.cat((index[: block.start], index[block.stop :]))
        return torch.cat((own, own + n, others, others + n))

    def _vertices(self, views: Sequence[Tensor], by_class: int) -> Tensor:
        return torch.cat([x.t() if by_class else x for x in views])[self.orders[by_class]]

    def losses(self, thresholds, kept, weights, delta: float, need_grad: bool):
        """As :meth:`InterView.losses`."""
        teacher = [wait().to(self.dtype) for wait in self.waits]
        grads = [torch.zeros_like(x) for x in self.student] if need_grad else []
        losses = []
        for by_class, share in enumerate(self.shares):
            students, teachers = (self._vertices(views, by_class) for views in (self.student, teacher))
            own = students[: share.rows]
            into = [torch.zeros_like(own), torch.zeros_like(students)] if need_grad else ()
            sides = own, students, teachers[: share.rows], teachers
            losses.append(share.loss(sides, thresholds[by_class], kept[by_class], weights[by_class], delta, into))
            if need_grad:
                into[1][: share.rows] += into[0]
                both = torch.empty_like(into[1])
                both[self.orders[by_class]] = into[1]
                for grad, part in zip(grads, both.chunk(2), strict=True):
                    grad += part.t() if by_class else part
        waits = [self.group.start_sum_rows(x) for x in grads]
        return losses, lambda: [wait() for wait in waits]
