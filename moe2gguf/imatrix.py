"""llama.cpp's importance matrices (GGUF, as llama-imatrix writes them), read and written.

A matrix has two tensors: NAME.in_sum2, sums of squared inputs, and NAME.counts, over how many tokens.

Shapes: E experts (1 beside them), K columns.
"""

import dataclasses
import os
from pathlib import Path

import gguf
import numpy as np

from moe2gguf.costs import CostTable
from moe2gguf.errors import Moe2ggufError
from moe2gguf.quantize import FilePlan
from moe2gguf.source import Source, expert_axis, layer_of
from moe2gguf.stats import CalibrationStats

SUMS, COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """Mean squared inputs by tensor name, f32 (E, K). An expert that saw nothing has ones, as in llama-quantize.

    Raises Moe2ggufError for anything but an importance matrix in GGUF.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise Moe2ggufError(
            f"{path} is no GGUF ({error}); importance matrices in llama.cpp's old format can be converted with "
            "llama-imatrix --in-file OLD -o NEW.gguf"
        ) from error
    arrays = {tensor.name: tensor.data for tensor in reader.tensors}
    found = {}
    for name, sums in arrays.items():
        stem = name.removesuffix(SUMS)
        if stem == name:
            continue
        if stem + COUNTS not in arrays:
            raise Moe2ggufError(f"{path} has {name} without {stem}{COUNTS}; it is damaged")
        sums_EK = np.asarray(sums, np.float32).reshape(-1, sums.shape[-1])
        counts_E1 = np.asarray(arrays[stem + COUNTS], np.float32).reshape(-1, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found[stem] = np.where(counts_E1 > 0, sums_EK / counts_E1, 1).astype(np.float32)
    if not found:
        raise Moe2ggufError(f"{path} holds no importance matrix: no tensor of it ends with {SUMS}")
    return found


def with_imatrix(plan: FilePlan, imatrix: dict[str, np.ndarray], path: Path) -> FilePlan:
    """The plan with the importance of the file; tensors the file does not know weigh all columns alike.

    Raises Moe2ggufError where a matrix has another shape, or none of the plan's tensors is in the file.
    """
    tensors, n_known = [], 0
    for tensor in plan.tensors:
        # llama-imatrix also measures routers, which stay as they are
        found_EK = imatrix.get(tensor.source.name) if tensor.source.quantisable else None
        if found_EK is None:
            tensors.append(dataclasses.replace(tensor, importance_EK=None))
            continue
        n_experts = tensor.source.shape[0] if expert_axis(tensor.source.name) == 0 else 1
        if found_EK.shape != (n_experts, tensor.source.shape[-1]):
            raise Moe2ggufError(
                f"{path} has {found_EK.shape[0]} x {found_EK.shape[1]} values for {tensor.source.name}, which needs "
                f"{n_experts} x {tensor.source.shape[-1]}; it was made on another model"
            )
        n_known += 1
        order = slice(None) if tensor.experts is None or n_experts == 1 else tensor.experts
        tensors.append(dataclasses.replace(tensor, importance_EK=found_EK[order]))
    if n_known == 0:
        raise Moe2ggufError(f"{path} knows none of the model's tensors; it was made on another model")
    return dataclasses.replace(plan, tensors=tuple(tensors))


def write_imatrix(path: Path, source: Source, table: CostTable, stats: CalibrationStats) -> None:
    """What llama-quantize --imatrix reads. Ours is weighted by the gates and shrunk; written aside and renamed."""
    aside = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(aside, arch="imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [stats.text])
    n_sequences, length = stats.tokens_SL.shape
    writer.add_uint32("imatrix.chunk_count", n_sequences)
    writer.add_uint32("imatrix.chunk_size", length)
    for name, importance_EK, n_tokens_E in sorted(_matrices(source, table, stats), key=lambda matrix: matrix[0]):
        # an expert without tokens has the layer's average, which counts as one
        counts_E1 = np.maximum(n_tokens_E, 1).astype(np.float32)[:, None]
        writer.add_tensor(name + SUMS, (importance_EK * counts_E1).astype(np.float32))
        writer.add_tensor(name + COUNTS, counts_E1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(aside, path)


def _matrices(source: Source, table: CostTable, stats: CalibrationStats) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name, importance f32 (E, K), tokens i64 (E,)."""
    columns_of = {tensor.name: tensor.columns_K for tensor in source.tensors if tensor.columns_K is not None}
    found = [
        (name, stats.importance[unit.importance][None, columns_of.get(name, slice(None))], np.array([stats.n_tokens]))
        for unit in table.units
        if unit.importance is not None
        for name in unit.tensors
    ]
    for tensor in source.tensors:
        layer = stats.layers.get(layer_of(tensor.name) or 0)
        if expert_axis(tensor.name) == 0 and tensor.quantisable and layer is not None:
            down = "ffn_down" in tensor.name
            importance_EK = layer.importance_down_EI if down else layer.importance_gate_up_ED
            found.append((tensor.name, importance_EK, layer.n_tokens_E))
    return found
