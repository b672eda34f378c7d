"""What the examples share, so that each shows one thing: scikit-learn's digits, a network, a teacher, an accuracy."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10
torch.set_num_threads(1)  # the fastest for networks as small as these


def parts() -> tuple[TensorDataset, TensorDataset]:
    """``(train, test)``: images ``[1, 8, 8]`` in [0, 1] with labels, 1200 and 597 of them."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def light(image: Tensor) -> Tensor:
    """The real view: moved by up to a pixel."""
    down, right = torch.randint(3, (2,)).tolist()
    return F.pad(image, (1, 1, 1, 1))[..., down : down + 8, right : right + 8]


def strong(image: Tensor) -> Tensor:
    """The virtual view: moved, brighter or darker, noisy, and with a corner wiped out."""
    image = light(image) * (0.5 + torch.rand(())) + 0.1 * torch.randn_like(image)
    row, column = torch.randint(6, (2,)).tolist()
    image[..., row : row + 3, column : column + 3] = 0
    return image


def network(width: int) -> nn.Sequential:
    """A small convolutional network: logits ``[B, 10]`` of images ``[B, 1, 8, 8]``."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * width, CLASSES),
    )  # fmt: skip


def trained_teacher(train: TensorDataset, epochs: int = 4) -> nn.Module:
    """A network of 32 channels, trained on ``train``. Yours comes from a checkpoint."""
    torch.manual_seed(0)
    teacher = network(32)
    optimizer = torch.optim.AdamW(teacher.parameters(), 1e-2)
    for _ in range(epochs):
        for images, labels in DataLoader(train, 64, shuffle=True):
            loss = F.cross_entropy(teacher(light(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """The fraction of ``test`` that ``model`` gets right, in evaluation mode."""
    images, labels = test.tensors
    device = next(model.parameters()).device
    return (model.eval()(images.to(device)).argmax(1).cpu() == labels).float().mean().item()
