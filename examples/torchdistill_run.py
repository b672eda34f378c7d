"""torchdistill: the loss, the two views and their batches are named in examples/torchdistill.yaml.

python examples/torchdistill_run.py
"""

from pathlib import Path

import torch
from digits import accuracy, light, network, parts, trained_teacher
from torch.utils.data import Dataset
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import DistillationBox

import vrm_kernels.adapters.torchdistill  # noqa: F401 (registers what the file names)


class Items(Dataset):
    """torchdistill's datasets hold labels as numbers; the light augmentation is the dataset's own here."""

    def __init__(self, part, transform):
        self.part, self.transform = part, transform

    def __len__(self):
        return len(self.part)

    def __getitem__(self, index):
        image, label = self.part[index]
        return self.transform(image), int(label)


train, test = parts()
teacher, student = trained_teacher(train), network(4)
config = load_yaml_file(str(Path(__file__).with_name("torchdistill.yaml")))
datasets = {"train": Items(train, light), "test": Items(test, lambda image: image)}
box = DistillationBox(teacher, student, datasets, config, torch.device("cpu"), None, False, 1)
for epoch in range(config["num_epochs"]):
    student.train()
    box.pre_epoch_process(epoch=epoch)
    for images, labels, extra in box.train_data_loader:
        loss = box.forward_process(images, labels, extra)
        box.post_forward_process(loss)
    print(f"epoch {epoch}: loss {loss.item():.3f}")

print(f"teacher {accuracy(teacher, test):.1%}, student {accuracy(student, test):.1%}")
