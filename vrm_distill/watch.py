"""What says of a run in its first steps, or before them, that it will not come to much."""

import math
from collections.abc import Callable

import torch
from torch import nn

from vrm_distill.data import ImageData
from vrm_distill.settings import Settings

# Above this multiple of the cross-entropies the relations alone lead the training; gradients of this norm end it.
_RELATIONS, _GRADIENTS = 100.0, 1e6
# Logits that vary less than this over images count as equal: a relation's gradient grows with the inverse.
_EQUAL = 1e-3
# A teacher is near chance if its accuracy is within so many standard errors of it.
_ERRORS = 3.0
_IMAGES = 64


class Watch:
    """Collects warnings, each once; ``say`` is called with each as it comes.

    Args:
        warnings: of an earlier part of the run.
    """

    def __init__(self, say: Callable[[str], None], warnings: list[str]) -> None:
        self.say, self.warnings = say, list(warnings)

    def warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)
            self.say(f"warning: {sentence}")

    def sizes(self, teacher: int, student: int, processes: int, settings: Settings) -> None:
        """Look at the numbers of parameters and of processes."""
        if student > teacher:
            self.warn(
                f"the student {settings.student} has {student:,} parameters, more than the {teacher:,} of its teacher "
                f"{settings.teacher}: are they exchanged?"
            )
        if processes > 1 and not settings.gather_distributed and (settings.alpha or settings.beta):
            self.warn(
                f"relations are those of each of {processes} processes' own share of a batch: --gather-distributed "
                f"takes those of the whole batch"
            )

    def teacher(self, accuracy: float, images: int, data: ImageData) -> None:
        """Look at the teacher's accuracy on so many images."""
        chance = 1 / data.classes
        if accuracy <= chance + _ERRORS * math.sqrt(chance * (1 - chance) / images):
            self.warn(
                f"the teacher is near chance, {accuracy:.1%} of {images} test images right with {data.classes} "
                f"classes: was it trained on these classes, in this order, on images of this size and normalisation?"
            )

    def step(self, step: int, terms: dict[str, float], norm: float, settings: Settings, what: str) -> None:
        """Look at one of the first steps; ``terms`` as :func:`vrm_distill.engine.distillation_loss` has them."""
        entropy = sum(terms.get(name, 0.0) for name in ("ce_real", "ce_virtual"))
        relations = settings.alpha * terms.get("inter_sample", 0.0) + settings.beta * terms.get("inter_class", 0.0)
        if relations > _RELATIONS * entropy:
            self.warn(
                f"the relations are {relations / max(entropy, 1e-9):.3g} times the cross-entropies at step {step} of "
                f"{what}: a longer --relation-warmup, or smaller --alpha and --beta, if it does not learn"
            )
        if norm >= _GRADIENTS:
            self.warn(
                f"the gradients have a norm of {norm:.1e} at step {step} of {what}: --relation-warmup 1, a smaller "
                f"--clip-grad, or another initialisation of the network's last layer"
            )

    @torch.no_grad()
    def starts_equal(self, student: nn.Module, data: ImageData, settings: Settings) -> bool:
        """Whether a new student gives all images the same logits, as a last layer of zeros does.

        Relations of equal logits have no direction, and gradients of the inverse of eps.
        """
        images, _ = data.train[torch.arange(min(_IMAGES, len(data.train)))]
        device = next(student.parameters()).device
        student.eval()
        spread = student(data.normalized(images.to(device))).float().std(0).max().item()
        student.train()
        if equal := spread < _EQUAL:
            self.warn(
                f"the student {settings.student} starts with the same logits for all images (a last layer of zeros?), "
                f"of which there are no relations: --alpha and --beta grow from 0 over the first epoch"
            )
        return equal
