"""The installed package computes what the reference does: a script, to be run outside of the source tree."""

import torch

import vrm_kernels

print(vrm_kernels.__file__, vrm_kernels.backends.describe(), sep="\n")
usable, note = vrm_kernels.backends.REGISTRY["cpp"].status()
backend = "cpp" if usable else vrm_kernels.backends.resolve("auto", torch.device("cpu"))
torch.manual_seed(0)
results = []
for name in (backend, "reference"):
    views = [torch.randn(24, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    for view in views[:2]:
        view.requires_grad_()
    loss = vrm_kernels.VRMLoss(1.0, 1.0, backend=name)(*views, torch.arange(24) % 10)
    loss.backward()
    results.append((loss.detach(), views[0].grad, views[1].grad))
torch.testing.assert_close(*results)
print(f"{backend} agrees with the reference beside torch {torch.__version__}")
