"""The stages of docs/gpu.md in Triton, a file each; backend.py puts them together."""
