"""Compress a Hugging Face Mixture-of-Experts model into the best GGUF there is at a given size."""

import os

__version__ = "0.1.0"

# How often GNU OpenMP, which torch and llama.cpp compute with, looks whether other threads are done before it sleeps;
# read when either is loaded. Its own 300,000 are milliseconds, which another program on these cores waits for, as we do
# for that one's: two conversions side by side took three times as long. So few cost nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# oneDNN, which multiplies in bfloat16 for torch, keeps a program for each of the last 1024 shapes: gigabytes where each
# expert has another number of tokens. So few are as fast.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "16")
