"""Triton kernels of moe2gguf. Each has a plain reference of the same name; see README.md beside this package."""
