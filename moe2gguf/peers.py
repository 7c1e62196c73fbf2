"""llama-quantize at its best: a preset, and types per tensor found by a greedy search. llama.cpp's tools only.

The search: tensors form classes (attention, the experts' gate and up, their down, other matrices; each in at most
MAX_BANDS bands of layers; embedding; output). Each class in turn is quantised at two probe types with everything else
at Q8_0, and llama-perplexity measures what that adds to the KL divergence on calibration text. ln KLD is taken as
linear in bits per weight, which fixes it for all types, and the sum over classes as the whole file's. From the fewest
bits everywhere, the class that gains most per byte goes up one type until nothing fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe2gguf import ggml
from moe2gguf.child import Finished
from moe2gguf.errors import BudgetError, Moe2ggufError
from moe2gguf.ggml import QuantType
from moe2gguf.gguf_reader import GgufFile, GgufTensor
from moe2gguf.imatrix import read_imatrix
from moe2gguf.llama_tools import BaseRun, divergence, run_base, run_tool
from moe2gguf.source import layer_of

# mixtures of types; their sizes on the model at hand come from llama-quantize's dry run
PRESETS = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "Q2_K_S",
    "Q2_K",
    "IQ3_XXS",
    "IQ3_XS",
    "IQ3_S",
    "IQ3_M",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "IQ4_XS",
    "IQ4_NL",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
)

# types that are no worse than another of as many bits; llama-quantize refuses some without an importance matrix
LADDER = tuple(
    QuantType[name]
    for name in ("IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0")
)
LADDER_WITHOUT_IMPORTANCE = tuple(QuantType[name] for name in ("Q2_K", "IQ3_S", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0"))
LADDER_OF_SMALL_BLOCKS = tuple(QuantType[name] for name in ("IQ4_NL", "Q5_0", "Q8_0"))
REST = QuantType.Q8_0  # everything else while a class is probed
PROBE_BITS = (2.1, 3.1)
MAX_BANDS = 5
# per bit, as ln KLD: rounding noise falls by ln 4, and what is measured may be noise
STEEPEST, FLATTEST = -3.0, -0.3
LEAST_KLD = 1e-7
FLOAT_TYPES = {QuantType.F32, QuantType.F16, QuantType.BF16}


def preset_tensor_bytes(base: Path, folder: Path) -> dict[str, int]:
    """What each preset would make of the base, by its dry run, which rounds to 0.01 MiB."""
    return {preset: int(_dry_run_mib(preset, base, folder) * 2**20) for preset in PRESETS}


def quantize_preset(preset: str, base: Path, imatrix: Path, outfile: Path, n_threads: int, folder: Path) -> Finished:
    return run_tool("llama-quantize", ["--imatrix", imatrix, base, outfile, preset, n_threads], folder)


def _dry_run_mib(preset: str, base: Path, folder: Path) -> float:
    output = run_tool("llama-quantize", ["--dry-run", base, folder / "unused.gguf", preset], folder).output
    match = re.search(r"quant size\s*=\s*([\d.]+) MiB", output)
    if match is None:
        raise Moe2ggufError(f"llama-quantize's dry run of {preset} states no size; see {folder / 'llama-quantize.log'}")
    return float(match[1])


@dataclass(frozen=True)
class TensorClass:
    """Tensors that are given the same type."""

    name: str
    tensors: tuple[GgufTensor, ...]  # of the base
    ladder: tuple[QuantType, ...]  # the types it may have, fewest bits first

    def file_bytes(self, quant_type: QuantType) -> int:
        return sum(_padded(_encoded_bytes(tensor, quant_type)) for tensor in self.tensors)

    def probe_types(self) -> tuple[QuantType, QuantType]:
        low, high = (min(self.ladder, key=lambda t: abs(ggml.bits_per_weight(t) - bits)) for bits in PROBE_BITS)
        return (low, high) if low != high else (self.ladder[0], self.ladder[1])


def tensor_classes(base: GgufFile, preset: GgufFile, imatrix: Path) -> tuple[TensorClass, ...]:
    """Of all that llama-quantize quantises, which its preset's file shows."""
    known = read_imatrix(imatrix)
    quantised = {tensor.name for tensor in preset.tensors if tensor.type not in FLOAT_TYPES}
    layers = sorted({layer for t in base.tensors if (layer := layer_of(t.name)) is not None})
    n_bands = min(MAX_BANDS, len(layers))
    members: dict[str, list[GgufTensor]] = {}
    for tensor in base.tensors:
        if tensor.name in quantised:
            layer = layer_of(tensor.name)
            band = None if layer is None else layers.index(layer) * n_bands // len(layers)
            role = _role(tensor.name)
            members.setdefault(role if band is None else f"{role}, band {band + 1} of {n_bands}", []).append(tensor)
    return tuple(TensorClass(name, tuple(tensors), _ladder(tensors, known)) for name, tensors in members.items())


def _role(name: str) -> str:
    if layer_of(name) is None:
        return name.removesuffix(".weight")
    if "_exps." in name:
        return "experts' down" if "ffn_down" in name else "experts' gate and up"
    return "attention" if ".attn_" in name else "other"


def _ladder(tensors: Sequence[GgufTensor], known: Mapping[str, object]) -> tuple[QuantType, ...]:
    if not all(ggml.fits(LADDER[0], tensor.shape[-1]) for tensor in tensors):
        return LADDER_OF_SMALL_BLOCKS
    return LADDER if all(tensor.name in known for tensor in tensors) else LADDER_WITHOUT_IMPORTANCE


def _encoded_bytes(tensor: GgufTensor, quant_type: QuantType) -> int:
    return math.prod(tensor.shape[:-1]) * ggml.row_bytes(quant_type, tensor.shape[-1])


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // 32) * 32  # GGUF's alignment


def measure_classes(
    classes: Sequence[TensorClass],
    base: Path,
    imatrix: Path,
    text: Path,
    folder: Path,
    *,
    n_chunks: int,
    n_ctx: int,
    n_threads: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, dict[QuantType, float]]:
    """What each class alone at each of its two probe types adds to the mean KL divergence, nats per token."""
    logits, probe, types_file = folder / "probe.kld", folder / "probe.gguf", folder / "probe-types.txt"
    base_run: BaseRun = run_base(base, text, logits, n_ctx=n_ctx, max_chunks=n_chunks, n_threads=n_threads)

    def kld(types: Mapping[str, QuantType]) -> float:
        quantize_with_types(types, base, imatrix, REST.name, probe, types_file, n_threads, folder)
        found = divergence(probe, logits, base_run, n_ctx=n_ctx, n_threads=n_threads, folder=folder)
        return found.kld_mean

    try:
        rest_kld = kld({})
        probes = [(c, t) for c in classes for t in c.probe_types()]
        found: dict[str, dict[QuantType, float]] = {c.name: {} for c in classes}
        for n_done, (tensor_class, quant_type) in enumerate(probes):
            progress("the greedy search probes", n_done, len(probes))
            with_class = kld({tensor.name: quant_type for tensor in tensor_class.tensors})
            found[tensor_class.name][quant_type] = with_class - rest_kld
        return found
    finally:
        for path in (logits, probe, types_file):
            path.unlink(missing_ok=True)


def greedy_types(
    classes: Sequence[TensorClass], probed: Mapping[str, Mapping[QuantType, float]], tensor_bytes: int
) -> dict[str, QuantType]:
    """A type for each tensor of the classes, all of them in at most tensor_bytes with their padding.

    Raises BudgetError where the fewest bits are too many.
    """
    step = dict.fromkeys(range(len(classes)), 0)
    left = tensor_bytes - sum(c.file_bytes(c.ladder[0]) for c in classes)
    if left < 0:
        raise BudgetError(
            f"the smallest types take {tensor_bytes - left:,} bytes, more than the {tensor_bytes:,} there are; choose "
            "more --bits"
        )
    while True:
        ups = []
        for i, c in enumerate(classes):
            if step[i] + 1 == len(c.ladder):
                continue
            here, above = c.ladder[step[i]], c.ladder[step[i] + 1]
            more = c.file_bytes(above) - c.file_bytes(here)
            if more <= left:
                gain = predicted_kld(probed[c.name], here) - predicted_kld(probed[c.name], above)
                ups.append((gain / more, i, more))
        if not ups:
            return {t.name: c.ladder[step[i]] for i, c in enumerate(classes) for t in c.tensors}
        _, i, more = max(ups)
        step[i] += 1
        left -= more


def predicted_kld(probed: Mapping[QuantType, float], quant_type: QuantType) -> float:
    """ln KLD on the line through the two probes, whose slope is kept between STEEPEST and FLATTEST per bit."""
    (low, low_kld), (high, high_kld) = sorted(probed.items(), key=lambda item: ggml.bits_per_weight(item[0]))
    low_bits, high_bits = ggml.bits_per_weight(low), ggml.bits_per_weight(high)
    at_low = math.log(max(low_kld, LEAST_KLD))
    slope = (math.log(max(high_kld, LEAST_KLD)) - at_low) / (high_bits - low_bits)
    slope = min(max(slope, STEEPEST), FLATTEST)
    return math.exp(at_low + slope * (ggml.bits_per_weight(quant_type) - low_bits))


def quantize_with_types(
    types: Mapping[str, QuantType],
    base: Path,
    imatrix: Path,
    preset: str,
    outfile: Path,
    types_file: Path,
    n_threads: int,
    folder: Path,
) -> Finished:
    """llama-quantize with a type for each tensor named, and the preset's for the others."""
    # its patterns are searched for in lower-cased names
    lines = [f"^{re.escape(name)}$={quant_type.name.lower()}\n" for name, quant_type in types.items()]
    types_file.write_text("".join(lines), encoding="utf-8")
    options: list[object] = ["--imatrix", imatrix]
    if types:
        options += ["--tensor-type-file", types_file]
    return run_tool("llama-quantize", [*options, base, outfile, preset, n_threads], folder)
