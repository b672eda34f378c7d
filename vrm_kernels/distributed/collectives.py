"""What the distributed loss sends over a process group: rows and columns of logits, and gradients back.

Batches may differ in size, and some may be empty: rows are padded to the largest batch while they are gathered.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# torch 2.13 has the first name, earlier versions have the second.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def tensor_on(device: torch.device, values: list, dtype: torch.dtype) -> Tensor:
    """Moves numbers of the host to ``device``. From pinned memory the copy does not wait for a GPU."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=on_gpu).to(device, non_blocking=on_gpu)


class Group:
    """A process group by name, and the sizes of its processes' batches once they are known."""

    def __init__(self, name: str):
        self.group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.sizes: list[int] = []

    def own_rows(self) -> slice:
        begin = sum(self.sizes[: self.rank])
        return slice(begin, begin + self.sizes[self.rank])

    def share_of(self, n: int, rank: int | None = None) -> slice:
        """This process's part, or another's, of ``n`` things, cut evenly."""
        rank = self.rank if rank is None else rank
        return slice(n * rank // self.world, n * (rank + 1) // self.world)

    @contextlib.contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Says which exchange failed, and what that usually means."""
        try:
            yield
        except RuntimeError as error:  # DistBackendError and the rest are RuntimeErrors
            raise RuntimeError(
                f"VRMLoss(gather_distributed=True), rank {self.rank} of {self.world}: the {what} failed. Another "
                "process of the group has ended, or did not come to this loss within the group's time-out "
                "(init_process_group(timeout=...)): look for the first error of the other ranks. "
                f"The library says: {error}"
            ) from error

    def exchange(self, values: list[float], device: torch.device) -> list[list[float]]:
        """Every process's few numbers, read by the host."""
        own = tensor_on(device, values, torch.float64)
        out = own.new_empty(self.world * len(values))
        with self.named("exchange of batch sizes and settings"):
            _all_gather(out, own, group=self.group)
            return out.view(self.world, -1).tolist()

    def start_gather_rows(self, x: Tensor):
        """Starts gathering ``[B_r, C]``; what it returns waits, and returns ``[sum of B_r, C]``."""
        most = max(self.sizes)
        rows = (F.pad(x, (0, 0, 0, most - len(x))) if len(x) < most else x).contiguous()
        out = rows.new_empty(self.world * most, rows.shape[1])
        with self.named("gathering of the logits"):  # as bytes: not every library knows every dtype
            work = _all_gather(out.view(torch.uint8), rows.view(torch.uint8), group=self.group, async_op=True)

        def wait() -> Tensor:
            with self.named("gathering of the logits"):
                work.wait()
            if min(self.sizes) == most:
                return out
            return torch.cat([part[:n] for part, n in zip(out.split(most), self.sizes, strict=True)])

        return wait

    def sum(self, x: Tensor, what: str) -> Tensor:
        """The sum over all processes, in place."""
        with self.named(what):
            dist.all_reduce(x, group=self.group)
        return x

    def start_sum_rows(self, x: Tensor):
        """Starts summing ``[sum of B_r, C]`` over the processes; what it returns waits, and returns the own rows.

        Each process receives its rows from every other process and adds them up in the order of the ranks. That takes
        as many bytes as a reduce-scatter in a ring and half of what gloo's takes, and the processes may have any number
        of rows.
        """
        columns = x.shape[1]
        own = self.sizes[self.rank] * columns
        receive = self._start_all_to_all(x, [n * columns for n in self.sizes], [own] * self.world, "gradients")

        def wait() -> Tensor:
            first, *others = receive().view(self.world, self.sizes[self.rank], columns).unbind()
            for other in others:
                first += other
            return first

        return wait

    def start_swap_columns(self, x: Tensor):
        """Starts sending every process its columns (:meth:`share_of` all) of this process's rows ``[B_r, C]``. What it
        returns waits, and returns this process's columns of all rows, ``[sum of B_r, C_r]``."""
        own, n = x.shape
        blocks = [self.share_of(n, r) for r in range(self.world)]
        counts = [own * (block.stop - block.start) for block in blocks]
        columns = blocks[self.rank].stop - blocks[self.rank].start
        send = x.new_empty(own * n)
        for part, block in zip(send.split(counts), blocks, strict=True):
            part.view(own, block.stop - block.start).copy_(x[:, block])
        receive = self._start_all_to_all(send, counts, [rows * columns for rows in self.sizes], "logits")
        return lambda: receive().view(sum(self.sizes), columns)

    def start_return_columns(self, x: Tensor, into: Tensor):
        """Starts the way back of :meth:`start_swap_columns`, from ``[sum of B_r, C_r]`` to the own rows. What it
        returns waits, adds them to ``into [B_r, C]`` and returns that."""
        own, n = into.shape
        blocks = [self.share_of(n, r) for r in range(self.world)]
        counts = [own * (block.stop - block.start) for block in blocks]
        receive = self._start_all_to_all(x, [rows * x.shape[1] for rows in self.sizes], counts, "gradients")

        def wait() -> Tensor:
            for part, block in zip(receive().split(counts), blocks, strict=True):
                into[:, block] += part.view(own, block.stop - block.start)
            return into

        return wait

    def _start_all_to_all(self, x: Tensor, send: list[int], receive: list[int], what: str):
        """Starts sending ``send[r]`` elements of contiguous ``x`` to each process r. What it returns waits, and returns
        the elements that came, ``receive[r]`` of process r, in the order of the ranks."""
        size = x.element_size()  # sent as bytes: not every library knows every dtype
        out = x.new_empty(sum(receive))
        with self.named(f"exchange of {what}"):
            work = dist.all_to_all_single(
                out.view(torch.uint8), x.flatten().view(torch.uint8), [n * size for n in receive],
                [n * size for n in send], group=self.group, async_op=True,
            )  # fmt: skip

        def wait() -> Tensor:
            with self.named(f"exchange of {what}"):
                work.wait()
            return out

        return wait
