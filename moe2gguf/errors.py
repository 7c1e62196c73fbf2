"""Errors a user can cause. The command line prints them as one sentence and exits with 1; everything else is a bug."""


class Moe2ggufError(Exception):
    """Says what was found against what is needed, names the tensor or file, and gives the way out."""


class SourceError(Moe2ggufError):
    """The checkpoint cannot be read: missing, truncated, not a MoE, unknown architecture or tokenizer."""


class BudgetError(Moe2ggufError):
    """The byte budget is outside what the model's allocation can reach."""


class OutputError(Moe2ggufError):
    """The target cannot be written."""


class FileFormatError(Moe2ggufError):
    """A GGUF file is malformed, or does not hold what it should."""


class RuntimeMissing(Moe2ggufError):
    """The patched llama-cpp-python is not installed or cannot be built."""


class DeviceError(Moe2ggufError):
    """The device asked for is not there, or what computes on it is not installed."""
