"""The augmentations that make the two views, batched and on the device of the images, by kornia."""

import torch
from torch import Tensor, nn

from vrm_distill.data.images import ImageData, to_unit
from vrm_distill.seeding import seed_everything

# RandAugment's operations without its two for colour, which need three channels, and without "invert" and
# "solarize_add", which turn white on black into black on white: no digit of the test set looks so.
GREY_POLICY = [
    [("auto_contrast", 0, 1)],
    [("equalize", 0, 1)],
    [("posterize", 4.0, 8.0)],
    [("solarize", 0.0, 1.0)],
    [("contrast", 0.1, 1.9)],
    [("brightness", 0.1, 1.9)],
    [("sharpness", 0.1, 1.9)],
    [("rotate", -30.0, 30.0)],
    [("shear_x", -0.3, 0.3)],
    [("shear_y", -0.3, 0.3)],
    [("translate_x", -0.1, 0.1)],
    [("translate_y", -0.1, 0.1)],
]

# Images with fewer pixels a side go through trial draws of the augmentation before the training.
_SMALL, _DRAWS = 3, 40
# What --augment takes: "auto" is one of the others by the channels and the size of the images.
AUGMENTATIONS = ("auto", "affine", "crop", "resized_crop", "none")


class Views(nn.Module):
    """A batch of images to its views, all normalised: ``(real, virtual)``, float32.

    ``affine`` (grey images): small rotations and shifts; ``crop``: CIFAR's crop of the image padded by an eighth, and a
    flip; ``resized_crop``: ImageNet's crop of any scale, and a flip. The virtual view adds RandAugment, two operations
    of magnitude 15; with ``none`` all views are the images. Of ``virtual_views`` for each image the second ones follow
    all the first ones: ``[virtual_views * B, ...]``.
    """

    def __init__(self, data: ImageData, kind: str = "auto", virtual_views: int = 1) -> None:
        import kornia.augmentation as K
        from kornia.augmentation.auto import RandAugment

        super().__init__()
        if kind not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {kind!r}")
        if kind == "auto":
            kind = "affine" if data.in_channels == 1 else "crop" if max(data.size) <= 96 else "resized_crop"
        height, width = data.size
        geometry = {
            "affine": lambda: [K.RandomAffine(degrees=10.0, translate=(0.1, 0.1), p=1.0)],
            "crop": lambda: [K.RandomCrop(data.size, padding=(width // 8, height // 8)), K.RandomHorizontalFlip()],
            "resized_crop": lambda: [K.RandomResizedCrop(data.size), K.RandomHorizontalFlip()],
            "none": lambda: [],
        }[kind]
        # kornia draws the two operations once a batch, and each operation's direction once an image.
        policy = {} if data.in_channels == 3 else {"policy": GREY_POLICY}
        strong = [] if kind == "none" else [RandAugment(n=2, m=15, **policy)]
        # The affine view is a light one of its own; the crops come before RandAugment, as in the papers that use both.
        self.real = nn.Sequential(*geometry())
        self.virtual = nn.Sequential(*([] if kind == "affine" else geometry()), *strong)
        self.data, self.virtual_views = data, virtual_views

    @torch.no_grad()
    def forward(self, images: Tensor, virtual: bool = True) -> tuple[Tensor, Tensor]:
        images = to_unit(images)
        # The real view is drawn first, so that it is the same whether or not a virtual one follows.
        real = self.data.normalized(self.real(images))
        if not virtual:
            return real, real
        return real, self.data.normalized(torch.cat([self.virtual(images) for _ in range(self.virtual_views)]))


def check_views(data: ImageData, kind: str) -> None:
    """Refuse images that the augmentation ``kind`` cannot take.

    Raises:
        ValueError: naming their size, and the reason.
    """
    images, _ = data.train[torch.arange(min(2, len(data.train)))]
    try:
        # So many draws that each of RandAugment's operations is among them.
        for draw in range(_DRAWS if min(data.size) < _SMALL else 1):
            seed_everything(images.device, draw)
            Views(data, kind)(images)
    except Exception as error:  # kornia's and torch's, of many kinds
        raise ValueError(
            f"images of {data.size[0]}x{data.size[1]} are too small for it ({str(error).splitlines()[0]}): "
            f"--image-size N makes those of folder:, parquet: and hub: larger; --augment none leaves them alone"
        ) from error


def mixup(real: Tensor, virtual: Tensor, labels: Tensor, classes: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mixup (arXiv 1710.09412), with the same partners and the same weight in both views.

    Args:
        real, virtual: ``[B, ...]`` and ``[V * B, ...]``.
        labels: class indices ``[B]``.
        alpha: of the Beta(alpha, alpha) that one weight for the batch is drawn from; torch's global generator draws.

    Returns:
        The mixed views, and class probabilities ``[B, classes]``.
    """
    weight = torch.distributions.Beta(alpha, alpha).sample().item()
    partner = torch.randperm(labels.shape[0]).to(labels.device)
    targets = nn.functional.one_hot(labels, classes).float()

    def mixed(x: Tensor) -> Tensor:
        return torch.cat([weight * part + (1 - weight) * part[partner] for part in x.split(len(labels))])

    return mixed(real), mixed(virtual), mixed(targets)
