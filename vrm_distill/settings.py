"""What a run is made of: every setting of ``vrm-distill`` and its default, in one place."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vrm_kernels import functional as VF

TEACHER = "teacher"
DISTILLED = "distilled"
# The ways of training one student, by their names in the log.
METHODS = {
    "alone_real": "student alone, real view",
    "alone_both": "student alone, both views",
    DISTILLED: "student distilled",
}
BASELINES = ("alone_real", "alone_both")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "step", "constant")
PRECISIONS = ("no", "bf16", "fp16")
CACHE_DTYPES = ("float32", "float16")
TRACKERS = ("tensorboard", "wandb", "mlflow")
# A resumed run may change these settings, since no number of a run depends on them. The teacher's weights have a
# fingerprint of their own, so the path of its file does not matter.
INCIDENTAL = (
    "teacher_checkpoint",
    "teacher_cache",
    "checkpoint_steps",
    "data_dir",
    "find_unused_parameters",
    "output_dir",
    "track",
    "workers",
)


@dataclass(frozen=True)
class Settings:
    """What ``vrm-distill`` takes; its help says what each means."""

    dataset: str = "digits"
    data_dir: Path = Path("data")
    train_images: int | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: str = "auto"
    skip_broken: bool = False
    workers: int = 0

    teacher: str = "conv_32_64_128"
    teacher_checkpoint: tuple[Path, ...] = ()
    teacher_pretrained: bool = False
    teacher_cache: Path | None = None
    teacher_cache_dtype: str = "float32"
    view_epochs: int | None = None
    student: str = "conv_4_8_8"
    baselines: tuple[str, ...] = BASELINES

    teacher_epochs: int = 40
    teacher_lr: float = 0.005
    epochs: int = 30
    lr: float = 0.01
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    precision: str = "no"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    ema: float = 0.0
    clip_grad: float = 100.0
    find_unused_parameters: bool = False

    alpha: float = 4.0
    beta: float = 2.0
    relation_warmup: float = 0.0
    percentile: float = VF.DEFAULT_PERCENTILE
    relations: str = VF.DEFAULT_RELATIONS
    normalize: str | None = None
    virtual_views: int = 1
    kd_weight: float = 0.0
    backend: str = "auto"
    gather_distributed: bool = False

    seeds: int = 10
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    checkpoint_steps: int = 1000
    track: tuple[str, ...] = ()
    output_dir: Path = field(default=Path("runs"))

    @property
    def all_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)

    @property
    def methods(self) -> dict[str, str]:
        """The students to train, by the name of the method, in order; the distilled one is always among them."""
        return {name: title for name, title in METHODS.items() if name == DISTILLED or name in self.baselines}

    def views(self, seed: int) -> dict[str, int]:
        """What the views of a student of that seed follow from: the ``seed`` and ``view_epochs`` of its trainer."""
        if self.view_epochs is None:
            return {"seed": seed, "view_epochs": self.epochs}
        return {"seed": self.seed, "view_epochs": self.view_epochs}

    def plain(self) -> dict[str, Any]:
        """The settings as numbers, text, lists and ``None``: what YAML and a checkpoint hold."""

        def simple(value: Any) -> Any:
            if isinstance(value, tuple):
                return [simple(x) for x in value]
            return str(value) if isinstance(value, Path) else value

        return {name: simple(value) for name, value in asdict(self).items()}

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What of ``other``, an earlier :meth:`plain`, would make another run than these settings do."""
        return [
            f"--{name.replace('_', '-')} is {value} and was {other.get(name)}"
            for name, value in self.plain().items()
            if name not in INCIDENTAL and value != other.get(name)
        ]
