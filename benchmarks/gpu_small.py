"""A few small losses through every path of the triton backend, for compute-sanitizer to watch."""

import torch

import vrm_kernels.functional as VF
from vrm_kernels.backends.triton_gpu import plan


def main() -> None:
    torch.manual_seed(0)
    for fused in (plan.FUSED_ELEMENTS, 0):
        plan.FUSED_ELEMENTS = fused
        for relations in VF.RELATIONS:
            for sign in (1.0, -1.0):  # of the student: with -1 no edge is certified
                teacher = [torch.randn(40, 33, device="cuda") for _ in range(2)]
                students = [(sign * x + 0.5 * torch.randn_like(x)).requires_grad_() for x in teacher]
                loss = VF.vrm_loss(
                    *students, *teacher, None, 1.0, 1.0, False, False, relations=relations, backend="triton"
                )
                loss.backward()
                print(fused, relations, sign, loss.item())


if __name__ == "__main__":
    main()
