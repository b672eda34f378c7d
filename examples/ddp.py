"""DistributedDataParallel, with the relations of the global batch.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import os

import torch
import torch.distributed as dist
from digits import accuracy, light, network, parts, strong, trained_teacher
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from vrm_kernels import DualViewDataset, VRMLoss
from vrm_kernels.data import both_views

on_gpu = torch.cuda.is_available()
device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpu else "gloo")

train, test = parts()
teacher = trained_teacher(train).to(device)
torch.manual_seed(dist.get_rank())  # each process draws its own views; DDP spreads the first one's weights
student = DistributedDataParallel(network(4).to(device))

views = DualViewDataset(train, light, strong)
sampler = DistributedSampler(views, drop_last=True)
loader = DataLoader(views, batch_size=64 // dist.get_world_size(), sampler=sampler)
# The loss of all processes' samples, the same number everywhere. Its gradient suits DDP's average: rescale nothing.
loss_fn = VRMLoss(alpha=4.0, beta=2.0, gather_distributed=True)
optimizer = torch.optim.AdamW(student.parameters(), 1e-2)

for epoch in range(4):
    sampler.set_epoch(epoch)
    student.train()
    for batch in loader:
        real, virtual, labels = (x.to(device) for x in batch)
        with torch.no_grad():
            teacher_logits = both_views(teacher, real, virtual)
        # One pass through DDP a step: both views go through the student together.
        loss = loss_fn(*both_views(student, real, virtual), *teacher_logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: loss of the global batch {loss.item():.3f}", flush=True)

if dist.get_rank() == 0:
    print(f"teacher {accuracy(teacher, test):.1%}, student {accuracy(student.module, test):.1%}")
dist.destroy_process_group()
