"""Kernels of moe2gguf: Triton for the GPU, numba for the CPU (*_cpu.py).

Each has a plain reference of the same name; see README.md beside this package.
"""
