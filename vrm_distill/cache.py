"""A teacher's logits on disk: computed once, read by every student of the same views.

The views of an image are a function of seed, epoch and step, and so are the teacher's logits. A folder holds
``cache.json``, which names everything that they depend on, and for each seed of views the logits and their checksums,
both mapped into memory: a batch costs a read of its own bytes.
"""

import contextlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vrm_distill.checkpoint import fingerprint, write_atomically
from vrm_distill.data import ImageData
from vrm_distill.settings import Settings
from vrm_distill.trainer import Place
from vrm_kernels.data import both_views

DESCRIPTION = "cache.json"
# This bit of a checksum says that the logits are there; zlib's checksums have 32 bits.
_THERE = 1 << 32


class TeacherCache:
    """The logits of one seed's batches, read if they are there, else computed and kept.

    Args:
        folder: made if it is not there; may hold other seeds of the same views.
        depends: by name, everything but the seed that the logits depend on: text and numbers.
        seed: of the views.
        epochs: of views; later epochs have those of epoch modulo ``epochs``.
        steps, parts: of an epoch, and of a step over all processes.
        first_part: of this process.
        rows, classes: of the logits of a part, all its views one after the other.
        dtype: what they are kept in, float32 or float16; :meth:`logits` always gives float32.

    Raises:
        ValueError: the folder is of other logits, naming what differs.
        OSError: the files cannot be made, for instance for want of space.
    """

    def __init__(
        self,
        folder: Path,
        depends: dict[str, Any],
        *,
        seed: int,
        epochs: int,
        steps: int,
        parts: int,
        first_part: int,
        rows: int,
        classes: int,
        dtype: str,
    ) -> None:
        shape = (epochs, steps, parts, rows, classes)
        self.folder, self.dtype, self.epochs, self.first_part = Path(folder), dtype, epochs, first_part
        check_description(self.folder, {**depends, "shape": list(shape), "dtype": dtype})
        self._logits = _mapped(self.folder / f"logits-{seed}.bin", dtype, shape)
        self._checksums = _mapped(self.folder / f"checksums-{seed}.bin", "uint64", shape[:3])

    @property
    def size(self) -> str:
        """Of the logits of this seed, for people."""
        return f"{self._logits.nbytes / 2**20:.1f} MiB"

    def logits(self, place: Place, real: Tensor, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The teacher's logits of the real view and of the virtual ones, float32, on the device of ``real``.

        Logits whose checksum does not fit, as those that a computer was writing when it stopped, are computed anew.

        Args:
            real: the real view's images ``[B, ...]``.
            compute: the teacher's pass: logits ``[B, C]`` and ``[V * B, C]``.

        Raises:
            ValueError: the logits do not fit float16.
        """
        at = (place.epoch % self.epochs, place.step, self.first_part + place.part)
        kept = self._logits[at]
        if int(self._checksums[at]) != _checksum(kept):
            kept[:] = self._storable(torch.cat(compute())).numpy()
            self._checksums[at] = _checksum(kept)
        logits = torch.from_numpy(numpy.array(kept, "float32")).to(real.device)
        return logits[: len(real)], logits[len(real) :]

    def _storable(self, logits: Tensor) -> Tensor:
        stored = logits.to(getattr(torch, self.dtype))
        if not torch.equal(stored.isfinite(), logits.isfinite()):
            largest = logits[logits.isfinite()].abs().max()
            raise ValueError(f"float16 does not hold the teacher's logits, up to {largest:.3g}: keep them in float32")
        return stored.cpu()


def check_description(folder: Path, description: dict[str, Any]) -> None:
    """Write what the logits in ``folder`` depend on, or compare it with what is written there.

    Raises:
        ValueError: naming what differs.
        OSError: it cannot be written.
    """
    path = folder / DESCRIPTION
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any(not file.name.startswith(".") for file in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and has no {DESCRIPTION}: name a new folder")
        write_atomically(path, lambda file: file.write(json.dumps(description, indent=1).encode()))
    try:
        found = json.loads(path.read_text())
        names = [name for name in {**found, **description} if found.get(name) != description.get(name)]
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"{path} cannot be read: name a new folder") from None
    if names:
        differences = (f"{name} is {description.get(name)} and was {found.get(name)}" for name in names)
        raise ValueError(f"{folder} holds the logits of another teacher or of other views: {'; '.join(differences)}")


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> numpy.memmap:
    """A file as an array, zeros if it is new.

    All its bytes are reserved: on a full disk, writing to a mapped file that is not would end the process.
    """
    size = numpy.dtype(dtype).itemsize * math.prod(shape)
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                # A link fails if the file exists, where renaming would replace it: two runs that start at once both
                # use the file of the faster one.
                with contextlib.suppress(FileExistsError):
                    os.link(file.name, path)
            except OSError as error:
                raise OSError(f"{path} needs {size / 2**20:.0f} MiB, which cannot be had: {error.strerror}") from error
            finally:
                os.unlink(file.name)
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes and not {size}: remove it")
    return numpy.memmap(path, dtype, "r+", shape=shape)


def _checksum(logits: numpy.ndarray) -> int:
    return _THERE | zlib.crc32(logits)


def open_cache(
    settings: Settings, data: ImageData, teacher: nn.Module, accelerator: Accelerator, seed: int
) -> TeacherCache:
    """The cache in ``settings.teacher_cache`` of what the students of a seed see, for this process.

    Raises:
        ValueError, OSError: as :class:`TeacherCache`.
    """
    import kornia

    views = settings.views(seed)
    processes, parts = accelerator.num_processes, settings.accumulate
    depends = {
        "the teacher's weights": fingerprint(teacher.state_dict()),
        "the images": data.fingerprint(),
        "--mean": list(data.mean),
        "--std": list(data.std),
        "--augment": settings.augment,
        "--virtual-views": settings.virtual_views,
        "--mixup": settings.mixup,
        "--batch-size": settings.batch_size,
        "--accumulate": parts,
        "the number of processes": processes,
        "--precision": settings.precision,
        "the device": accelerator.device.type,
        "torch": torch.__version__,
        "kornia": kornia.__version__,
    }
    samples = settings.batch_size // (processes * parts)
    # The first process makes the files, the others find them.
    with accelerator.main_process_first():
        return TeacherCache(
            settings.teacher_cache,
            depends,
            seed=views["seed"],
            epochs=views["view_epochs"],
            steps=len(data.train) // settings.batch_size,
            parts=processes * parts,
            first_part=accelerator.process_index * parts,
            rows=(1 + settings.virtual_views) * samples,
            classes=data.classes,
            dtype=settings.teacher_cache_dtype,
        )


@torch.no_grad()
def teacher_views(
    teacher: nn.Module, place: Place, real: Tensor, virtual: Tensor, cache: TeacherCache | None
) -> tuple[Tensor, Tensor]:
    """The teacher's logits of a micro-batch's views, from ``cache`` if there is one."""
    if cache is None:
        return both_views(teacher, real, virtual)
    return cache.logits(place, real, lambda: both_views(teacher, real, virtual))
