"""Compress a Hugging Face Mixture-of-Experts model into the best GGUF there is at a given size."""

__version__ = "0.1.0"
