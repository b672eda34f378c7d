"""The smallest whole: two views of each image, a teacher, a student, the loss.

python examples/minimal.py
"""

import torch
from digits import accuracy, light, network, parts, strong, trained_teacher
from torch.utils.data import DataLoader

from vrm_kernels import DualViewDataset, VRMLoss

device = "cuda" if torch.cuda.is_available() else "cpu"
train, test = parts()
teacher = trained_teacher(train).to(device)
student = network(4).to(device)

loader = DataLoader(DualViewDataset(train, light, strong), batch_size=64, shuffle=True, drop_last=True)
loss_fn = VRMLoss(alpha=4.0, beta=2.0)
optimizer = torch.optim.AdamW(student.parameters(), 1e-2)

for epoch in range(4):
    student.train()
    for batch in loader:
        real, virtual, labels = (x.to(device) for x in batch)
        with torch.no_grad():
            teacher_real, teacher_virtual = teacher(real), teacher(virtual)
        loss, terms = loss_fn(student(real), student(virtual), teacher_real, teacher_virtual, labels, return_terms=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shown = ", ".join(f"{name} {value.item():.3g}" for name, value in terms.items())
    print(f"epoch {epoch}: loss {loss.item():.3f} ({shown})")

print(f"teacher {accuracy(teacher, test):.1%}, student {accuracy(student, test):.1%}")
