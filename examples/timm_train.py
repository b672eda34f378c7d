"""timm's training script, in the parts that it is made of: models, augmentation, loader, optimizer, schedule.

    python examples/timm_train.py

In a copy of timm's own train.py, run with `--aug-splits 2 --aa rand-m9-mstd0.5`, the same takes three lines where the
loss of a batch is computed:

    with torch.no_grad():
        teacher_output = teacher(input)
    loss = loss_fn(*split_views(model(input)), *split_views(teacher_output), split_views(target)[0])
"""

import numpy
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import AugMixDataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import Dataset

from vrm_kernels import VRMLoss
from vrm_kernels.adapters.timm import split_views

EPOCHS, BATCH, SIZE = 3, 32, 32
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Digits(Dataset):
    """Colour images as timm's datasets give them: the transform is set by timm's loader."""

    def __init__(self, part: slice) -> None:
        digits = load_digits()
        grey = (digits.images[part] * (255 / 16)).astype(numpy.uint8)
        self.images = [Image.fromarray(image).resize((SIZE, SIZE)).convert("RGB") for image in grey]
        self.labels = digits.target[part].tolist()
        self.transform = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.labels[index]


def loader(part: slice, splits: int):
    dataset = Digits(part)
    return create_loader(
        AugMixDataset(dataset, num_splits=splits) if splits else dataset,
        input_size=(3, SIZE, SIZE), batch_size=BATCH, is_training=splits > 0, scale=(0.7, 1.0), hflip=0.0,
        auto_augment="rand-m9-mstd0.5" if splits else None, num_aug_splits=splits, num_workers=0,
        persistent_workers=False, device=device,
    )  # fmt: skip


def correct(model: torch.nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        right = [(model(images).argmax(1) == labels).float().mean().item() for images, labels in test]
    return sum(right) / len(right)


torch.manual_seed(0)
train, test = loader(slice(0, 800), splits=2), loader(slice(1200, 1500), splits=0)
teacher = timm.create_model("test_resnet", num_classes=10).to(device)
student = timm.create_model("test_byobnet", num_classes=10).to(device)
loss_fn = VRMLoss(alpha=4.0, beta=2.0)


def fit(model: torch.nn.Module, loss_of) -> None:
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3)
    schedule = CosineLRScheduler(optimizer, t_initial=EPOCHS)
    for epoch in range(EPOCHS):
        model.train()
        for images, labels in train:  # both splits, one after the other: [2 B, 3, H, W] and [2 B]
            loss = loss_of(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step(epoch + 1)
        print(f"epoch {epoch}: loss {loss.item():.3f}")


def distillation_loss(images, labels):
    with torch.no_grad():
        teacher_output = teacher(images)
    return loss_fn(*split_views(student(images)), *split_views(teacher_output), split_views(labels)[0])


fit(teacher, lambda images, labels: F.cross_entropy(teacher(images), labels))  # yours comes from a checkpoint
teacher.eval()
fit(student, distillation_loss)
print(f"teacher {correct(teacher):.1%}, student {correct(student):.1%}")
