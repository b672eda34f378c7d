"""Relations between features instead of logits: the embeddings that the classifiers see.

    python examples/features.py

Teacher and student embed in spaces of different width, so a linear layer takes the student's embeddings into the
teacher's. It is trained with the student and thrown away with the teacher.
"""

import torch
import torch.nn.functional as F
from digits import accuracy, light, network, parts, strong, trained_teacher
from torch import nn
from torch.utils.data import DataLoader

import vrm_kernels.functional as VF
from vrm_kernels import DualViewDataset
from vrm_kernels.data import both_views

train, test = parts()
teacher, student = trained_teacher(train), network(4)
teacher_body, student_body, head = teacher[:-1], student[:-1], student[-1]
into_teacher = nn.Linear(head.in_features, teacher[-1].in_features)

loader = DataLoader(DualViewDataset(train, light, strong), batch_size=64, shuffle=True, drop_last=True)
optimizer = torch.optim.AdamW([*student.parameters(), *into_teacher.parameters()], 1e-2)

for epoch in range(4):
    student.train()
    for real, virtual, labels in loader:
        with torch.no_grad():
            teacher_real, teacher_virtual = both_views(teacher_body, real, virtual)
        features_real, features_virtual = both_views(student_body, real, virtual)
        logits_real, logits_virtual = head(features_real), head(features_virtual)
        relations = VF.relation_loss(
            into_teacher(features_real),
            into_teacher(features_virtual),
            teacher_real,
            teacher_virtual,
            probs=(logits_real.detach().softmax(1), logits_virtual.detach().softmax(1)),  # what ranks the relations
            percentile=30.0,
        )
        loss = F.cross_entropy(logits_real, labels) + F.cross_entropy(logits_virtual, labels) + 4.0 * relations
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}, relations {relations.item():.3f}")

print(f"teacher {accuracy(teacher, test):.1%}, student {accuracy(student, test):.1%}")
