"""FSDP2: the student's weights are shards, the loss sees its logits as ever.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import os

import torch
import torch.distributed as dist
from digits import accuracy, light, network, parts, strong, trained_teacher
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from vrm_kernels import DualViewDataset, VRMLoss
from vrm_kernels.data import both_views

on_gpu = torch.cuda.is_available()
device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpu else "gloo")
mesh = init_device_mesh(device.type, (dist.get_world_size(),))

train, test = parts()
teacher = trained_teacher(train).to(device)
torch.manual_seed(0)  # the same first weights on every process, of which each keeps its shard
student = network(4).to(device)
for layer in student:
    if sum(p.numel() for p in layer.parameters()) > 100:
        fully_shard(layer, mesh=mesh)
fully_shard(student, mesh=mesh)
torch.manual_seed(dist.get_rank())  # each process draws its own views

views = DualViewDataset(train, light, strong)
sampler = DistributedSampler(views, drop_last=True)
loader = DataLoader(views, batch_size=64 // dist.get_world_size(), sampler=sampler)
loss_fn = VRMLoss(alpha=4.0, beta=2.0, gather_distributed=True)
optimizer = torch.optim.AdamW(student.parameters(), 1e-2)

for epoch in range(4):
    sampler.set_epoch(epoch)
    student.train()
    for batch in loader:
        real, virtual, labels = (x.to(device) for x in batch)
        with torch.no_grad():
            teacher_logits = both_views(teacher, real, virtual)
        loss = loss_fn(*both_views(student, real, virtual), *teacher_logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: loss of the global batch {loss.item():.3f}", flush=True)

whole = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    alone = network(4)
    alone.load_state_dict(whole)
    print(f"teacher {accuracy(teacher, test):.1%}, student {accuracy(alone, test):.1%}")
dist.destroy_process_group()
