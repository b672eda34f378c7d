"""Runs a worker of distributed_workers.py in several processes."""

import tempfile
from pathlib import Path

import distributed_workers as workers
import torch
import torch.multiprocessing as mp


def launch(world: int, name: str, *args, timeout: float = 30, dying: tuple[int, ...] = ()) -> list:
    """What ``workers.name(rank, world, *args)`` returned in each process."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            workers.main, args=(world, folder, timeout, name, args), nprocs=world, join=False, start_method="spawn"
        )
        for process in context.processes:
            process.join(max(60, 5 * timeout))
        assert not any(process.is_alive() for process in context.processes), "a process hangs"
        ranks = [rank for rank in range(world) if rank not in dying]
        results = [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in ranks]
    for result in results:
        if isinstance(result, AssertionError):
            raise result
    return results
