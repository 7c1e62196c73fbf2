"""What calibration leaves behind, and its file.

Shapes: S sequences, D hidden, I intermediate, E experts, K selected per token, J candidate types, B bins of [0, 1], P
classes of tokens.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe2gguf.errors import Moe2ggufError
from moe2gguf.ggml import QuantType

# tokens' worth of belief in the layer's average where an expert's own tokens are few
SHRINKAGE_TOKENS = 32
# of the file, and of what it says: raised when the same text gives other statistics
FORMAT_VERSION = 11
_HEADER_FIELDS = ("source_sha256", "n_tokens", "n_probe_tokens", "seed", "dtype", "text", "digest", "request")


@dataclasses.dataclass(frozen=True)
class DropHarm:
    """Of experts other than a token's top one: squared change of the output of all, where one is left out, summed."""

    sampled: np.ndarray  # i64 (2,): tokens, and experts selected by each
    protect_norm_P: np.ndarray  # f32 (P - 1,): ‖x‖₁ where the next class of tokens begins
    ratio_count_PB: np.ndarray  # f64, by the class of the token and g / its largest g
    ratio_harm_PB: np.ndarray  # f64
    # f64, by g / its largest g, in as many bins and one of all above, and by how often its sequence selects the expert,
    # over the experts' mean
    rare_count_RB: np.ndarray
    rare_harm_RB: np.ndarray  # f64


@dataclasses.dataclass(frozen=True)
class ExpertStats:
    """One MoE layer's calibration statistics."""

    n_tokens_E: np.ndarray  # i64: tokens routed to each expert
    gate_sum_E: np.ndarray  # f64: Σ g, as applied
    importance_gate_up_ED: np.ndarray  # f32: gate-weighted mean of x², shrunk
    importance_down_EI: np.ndarray  # f32
    drop_harm: DropHarm

    @property
    def n_cold(self) -> int:
        """Experts that saw so little text that their importance leans on their layer's average."""
        return int((self.n_tokens_E < SHRINKAGE_TOKENS).sum())


@dataclasses.dataclass(frozen=True)
class MatrixErrors:
    """What each candidate type does to one projection of a layer's experts, or to one other matrix."""

    error_EJ: np.ndarray  # f64: mean squared output error per token; E is 1 beside the experts
    probe_types: tuple[QuantType, ...]
    probe_kl: np.ndarray  # f64: KL in nats per token (`Probes.finish`) with the whole projection at each probe type
    # f64: of gate's and up's errors, each alone, the part that is gate's; for gate_up only
    gate_share_EJ: np.ndarray | None = None
    # f64: what the same errors cost by the loss's gradient, nats per token; for experts, where it was asked for
    graded_EJ: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class CalibrationStats:
    """All that allocation and quantisation need to know; independent of the budget."""

    types: tuple[QuantType, ...]  # the J candidates, in the order of the errors' last axis
    source_sha256: str  # of the checkpoint's config and tensor index
    n_tokens: int
    n_probe_tokens: int
    seed: int
    dtype: str  # what products were computed in, a key of DTYPES
    tokens_SL: np.ndarray  # i32: the text, which quantisation runs through the model once more
    text: str  # where the tokens came from: file names, or how the model wrote them
    digest: str  # sha256 of the token ids
    request: str  # sha256 of what was asked for: a file with another one must not be reused
    layers: dict[int, ExpertStats]
    importance: dict[str, np.ndarray]  # "layers.N.path" | "lm_head" -> f32 (columns,)
    errors: dict[str, MatrixErrors]  # the same names, "embed_tokens", and "layers.N.gate_up" | "layers.N.down"
    # where gradients were asked for, second moments of the loss's gradient: by an embedding, f32 (2, D, D), of most
    # tokens and of those held out
    embedding_moments_2DD: np.ndarray | None = None
    # and by what a layer's experts give together, f16 (D, D), over the mean of the diagonal
    output_moments: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)


def save_stats(stats: CalibrationStats, path: Path) -> None:
    """Writes one safetensors file, aside and renamed."""
    arrays: dict[str, np.ndarray] = {"tokens": stats.tokens_SL}
    for index, layer in stats.layers.items():
        for name, value in (vars(layer) | vars(layer.drop_harm)).items():
            if name != "drop_harm":
                arrays[f"experts/{index}/{name}"] = value
    for name, importance_K in stats.importance.items():
        arrays[f"importance/{name}"] = importance_K
    if stats.embedding_moments_2DD is not None:
        arrays["embedding_moments"] = stats.embedding_moments_2DD
    arrays |= {f"output_moments/{index}": moments_DD for index, moments_DD in stats.output_moments.items()}
    probe_types = {}
    for name, errors in stats.errors.items():
        arrays[f"error/{name}"], arrays[f"probe/{name}"] = errors.error_EJ, errors.probe_kl
        probe_types[name] = [t.name for t in errors.probe_types]
        if errors.gate_share_EJ is not None:
            arrays[f"gate_share/{name}"] = errors.gate_share_EJ
        if errors.graded_EJ is not None:
            arrays[f"graded/{name}"] = errors.graded_EJ
    header = {
        "format": FORMAT_VERSION,
        "types": [t.name for t in stats.types],
        "probe_types": probe_types,
        **{k: getattr(stats, k) for k in _HEADER_FIELDS},
    }
    aside = path.with_name(path.name + ".partial")
    save_file(
        {k: np.ascontiguousarray(v) for k, v in arrays.items()}, aside, {"moe2gguf": json.dumps(header, sort_keys=True)}
    )
    os.replace(aside, path)


def load_stats(path: Path) -> CalibrationStats:
    """Raises Moe2ggufError for a file that is not one of ours."""
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})["moe2gguf"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        if header["format"] == FORMAT_VERSION:
            return _from_file(header, arrays)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise Moe2ggufError(f"{path} is not a statistics file of `moe2gguf calibrate` ({error})") from error
    raise Moe2ggufError(f"{path} has format {header['format']}, this version reads {FORMAT_VERSION}; calibrate again")


def _from_file(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> CalibrationStats:
    fields: dict[int, dict[str, np.ndarray]] = {}
    importance, errors, output_moments = {}, {}, {}
    for key, array in arrays.items():
        kind, _, name = key.partition("/")
        if kind == "experts":
            index, field = name.split("/")
            fields.setdefault(int(index), {})[field] = array
        elif kind == "importance":
            importance[name] = array
        elif kind == "output_moments":
            output_moments[int(name)] = array
        elif kind == "error":
            probe_types = tuple(QuantType[t] for t in header["probe_types"][name])
            optional = (arrays.get(f"{kind}/{name}") for kind in ("gate_share", "graded"))
            errors[name] = MatrixErrors(array, probe_types, arrays[f"probe/{name}"], *optional)
    return CalibrationStats(
        types=tuple(QuantType[t] for t in header["types"]),
        tokens_SL=arrays["tokens"],
        layers={index: _expert_stats(layer) for index, layer in sorted(fields.items())},
        importance=importance,
        errors=errors,
        embedding_moments_2DD=arrays.get("embedding_moments"),
        output_moments=output_moments,
        **{k: header[k] for k in _HEADER_FIELDS},
    )


def _expert_stats(arrays: dict[str, np.ndarray]) -> ExpertStats:
    harm = {field.name: arrays.pop(field.name) for field in dataclasses.fields(DropHarm)}
    return ExpertStats(**arrays, drop_harm=DropHarm(**harm))
