"""The loss of the global batch of a process group; needs a torch that was built with torch.distributed."""
