"""Lightning: a LightningModule that distils.

python examples/lightning_fit.py
"""

from functools import partial

import lightning
import torch
from digits import accuracy, light, network, parts, strong, trained_teacher
from torch.utils.data import DataLoader

from vrm_kernels import DualViewDataset, VRMLoss
from vrm_kernels.adapters.lightning import Distillation

train, test = parts()
teacher = trained_teacher(train)
module = Distillation(
    teacher, network(4), VRMLoss(alpha=4.0, beta=2.0), make_optimizer=partial(torch.optim.AdamW, lr=1e-2)
)
trainer = lightning.Trainer(max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False)
loader = DataLoader(DualViewDataset(train, light, strong), batch_size=64, shuffle=True, drop_last=True)
trainer.fit(module, loader, DataLoader(test, batch_size=256))

print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
print(f"teacher {accuracy(teacher.cpu(), test):.1%}, student {accuracy(module.student.cpu(), test):.1%}")
