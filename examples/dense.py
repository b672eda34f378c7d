"""Dense prediction: pixels are samples, and the relations are those of some pixels of a batch, drawn anew each step.

    python examples/dense.py

Four digits make a canvas; each pixel's class is the digit it belongs to, or the background.
"""

import torch
import torch.nn.functional as F
from digits import parts
from torch import Tensor, nn

from vrm_kernels import VRMLoss
from vrm_kernels.dense import sample_locations

BACKGROUND, CLASSES, IGNORED = 10, 11, 255
PIXELS = 256  # of a batch: the relations' cost grows with its square
WEIGHT = torch.ones(CLASSES)
WEIGHT[BACKGROUND] = 0.1  # most pixels are background


def canvases(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` canvases ``[N, 1, 16, 16]`` of four digits each, and their pixels' classes ``[N, 16, 16]``."""
    chosen = torch.randint(len(labels), (count, 2, 2))
    # [N, 2, 2, 8, 8] to [N, 2, 8, 2, 8], which is a canvas of two rows of two digits
    canvas = images[chosen].squeeze(3).transpose(2, 3).reshape(count, 16, 16)
    classes = labels[chosen].repeat_interleave(8, 1).repeat_interleave(8, 2)
    target = torch.where(canvas > 0.25, classes, BACKGROUND)
    target[:, 0] = IGNORED  # as segmentation datasets mark pixels that nobody labelled
    return canvas.unsqueeze(1), target


def network(width: int) -> nn.Sequential:
    """Logits ``[B, 11, H, W]`` of images ``[B, 1, H, W]``; each pixel sees 13 by 13."""
    layers = []
    for channels, dilation in ((1, 1), (width, 1), (width, 2), (width, 2)):
        layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, CLASSES, 1))


def per_pixel(model: nn.Module, images: Tensor, target: Tensor) -> float:
    with torch.no_grad():
        right = model.eval()(images).argmax(1) == target
    return right[target < BACKGROUND].float().mean().item()


torch.manual_seed(0)
(train_images, train_labels), (test_images, test_labels) = (part.tensors for part in parts())
teacher, student = network(32), network(16)
loss_fn = VRMLoss(alpha=2.0, beta=1.0, ce_loss_on_real=False, ce_loss_on_virtual=False)
optimizer = torch.optim.AdamW(teacher.parameters(), 1e-2)
for _ in range(100):  # yours comes from a checkpoint
    images, target = canvases(train_images, train_labels, 16)
    loss = F.cross_entropy(teacher(images), target, WEIGHT, ignore_index=IGNORED)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
teacher.eval()

optimizer = torch.optim.AdamW(student.parameters(), 2e-2)
for step in range(100):
    real, target = canvases(train_images, train_labels, 16)
    # The virtual view of a dense task changes colours alone, so that a pixel is the same pixel in both views.
    virtual = real * (0.5 + torch.rand(len(real), 1, 1, 1)) + 0.1 * torch.randn_like(real)
    logits_real, logits_virtual = student(real), student(virtual)
    with torch.no_grad():
        teacher_real, teacher_virtual = teacher(real), teacher(virtual)
    views = (logits_real, logits_virtual, teacher_real, teacher_virtual)
    rows, _ = sample_locations(views, target, PIXELS, seed=step, ignore_index=IGNORED)
    relations = loss_fn(*rows, None)
    cross_entropy = sum(F.cross_entropy(x, target, WEIGHT, ignore_index=IGNORED) for x in (logits_real, logits_virtual))
    loss = cross_entropy + relations
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 24:
        print(f"step {step}: loss {loss.item():.3f}, relations {relations.item():.3f}")

images, target = canvases(test_images, test_labels, 64)
teacher_right, student_right = (per_pixel(model, images, target) for model in (teacher, student))
print(f"of the digits' pixels: teacher {teacher_right:.1%}, student {student_right:.1%}")
