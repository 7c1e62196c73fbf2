"""What a conversion is asked for."""

import dataclasses
from pathlib import Path

from moe2gguf.allocate import MAX_GROUPS
from moe2gguf.errors import Moe2ggufError
from moe2gguf.ggml import QuantType
from moe2gguf.skip import Skipping

# by what a token weighs in its experts: powers of its gate weight, 0, 1 and 2
AFFINITIES = ("none", "gate", "gate2")
AFFINITY = "gate"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How to calibrate."""

    text_paths: tuple[Path, ...] = ()  # empty: the model writes its own text
    writer: str = "ebss"  # how it does: "sample" | "ebss"
    n_sequences: int = 128
    sequence_tokens: int = 512
    n_probe_tokens: int = 2048
    # how experts of a layer compare: "probe", by their errors | "gradient", by these weighed by the loss's, which also
    # lets an expert's rows, and embeddings, be quantised under its second moments
    sensitivity: str = "gradient"
    # what products of layers are computed in, here and in quantisation: a key of DTYPES, or "auto"
    dtype: str = "auto"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Budget:
    """Exactly one of the two."""

    bits: float | None = None  # stored bits of all tensors per parameter
    size_bytes: int | None = None  # of the whole file

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.size_bytes is None):
            raise Moe2ggufError("give either --bits or --size")

    def describe(self) -> str:
        return f"{self.bits:g} bits per weight" if self.bits is not None else f"{self.size_bytes:,} bytes"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the allocation may choose from."""

    layout: str = "grouped"  # "grouped" | "stock"
    max_groups: int = MAX_GROUPS
    types: tuple[QuantType, ...] | None = None
    overrides: tuple[tuple[str, QuantType], ...] = ()
    allocator: str = "global"  # a key of ALLOCATORS
    objective: str = "size"  # "speed": somewhat more KL divergence in the bytes, for types that decode faster

    def __post_init__(self) -> None:
        if self.objective == "speed" and self.allocator != "global":
            raise Moe2ggufError(
                f"--allocator {self.allocator} knows no speed; --objective speed needs --allocator global"
            )


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How the experts' bytes are found."""

    feedback: bool = True  # False: ggml's encoder alone
    affinity: str = AFFINITY  # one of AFFINITIES
    router: str = "qesc"  # "none" leaves routers as they are
    tuning: bool = True  # of routers, norms and the scales of blocks, by gradient


DEFAULT_QUANTIZER = Quantizer()
NO_SKIPPING = Skipping()
