"""Compress a Hugging Face Mixture-of-Experts model into the best GGUF there is at a given size."""

import os

__version__ = "0.1.0"

# How often GNU OpenMP, which torch and llama.cpp compute with, looks whether other threads are done before it sleeps;
# read when either is loaded. Its own 300,000 are milliseconds, which another program on these cores waits for, as we do
# for that one's: two conversions side by side took three times as long. So few cost nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
