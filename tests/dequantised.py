"""The Hugging Face checkpoint that a GGUF file stands for: dequantised values under the checkpoint's names.

transformers on that checkpoint is the oracle for llama.cpp on the file. The way back is not written down per
architecture. It is read off the converter: checkpoints of the same shapes whose weights are tensor numbers
and element positions show, once converted, which checkpoint element every GGUF element comes from.

Trust comes from converting the result again, which must give the file's values exactly.
"""

import json
import re
import shutil
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe2gguf.errors import SourceError
from moe2gguf.source import SourceTensor, expert_axis, layer_of, open_source
from tests.tiny_moe import FP8_BLOCK, INT4_GROUP

# Tensor numbers start here and are even, positions stay below it, and float32 holds both exactly.
FIRST_NUMBER = 2**23


def dequantised_checkpoint(gguf_path: Path, hf_folder: Path, out_folder: Path) -> Path:
    """Writes `hf_folder` again as `out_folder`, with the values of `gguf_path` as float32 in one file."""
    values = dequantised_tensors(gguf_path)
    shapes = _float_shapes(hf_folder)
    numbers = _converted(hf_folder, {n: torch.full(s, FIRST_NUMBER + 2 * i) for i, (n, s) in enumerate(shapes.items())})
    positions = _converted(hf_folder, {n: torch.arange(prod(s)).reshape(s) for n, s in shapes.items()})
    assert numbers.keys() == values.keys(), numbers.keys() ^ values.keys()

    names = list(shapes)
    flat = {name: np.full(prod(shape), np.nan, np.float32) for name, shape in shapes.items()}
    for gguf_name, number in numbers.items():
        if (number < FIRST_NUMBER).all():
            continue  # made by the converter from the configuration, such as RoPE factors
        offset = 0
        if np.isfinite(number).all() and (number % 2 == 1).all():
            offset = 1  # 1 + a norm's weight
        elif not np.isfinite(number).all() or (number % 2 != 0).any():
            continue  # computed, such as -exp(A_log)
        for index in np.unique(number):
            chosen = number == index
            name = names[(int(index) - offset - FIRST_NUMBER) // 2]
            position = (positions[gguf_name][chosen] - offset).astype(np.int64)
            flat[name][position] = values[gguf_name][chosen] - np.float32(offset)
    for name, value in flat.items():
        if np.isnan(value).any():  # what is computed of it is not quantised, or the check below fails
            value[:] = _float_tensor(hf_folder, name).flatten()

    shutil.copytree(hf_folder, out_folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    _write_float_checkpoint(out_folder, {name: torch.from_numpy(flat[name].reshape(shapes[name])) for name in names})
    for tensor in open_source(out_folder).tensors:
        np.testing.assert_array_equal(tensor.load(), values[tensor.name], err_msg=tensor.name)
    return out_folder


def float_checkpoint(hf_folder: Path, out_folder: Path) -> Path:
    """Writes one in FP8 or packed integers as the floats that it stands for, experts in BF16 as the stream has them."""
    tensors = load_file(hf_folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scales = tensors.pop(name)
        for axis in (0, 1):
            scales = scales.repeat_interleave(FP8_BLOCK, axis)
        weight_NK = tensors[name.removesuffix("_scale_inv")].float()
        tensors[name.removesuffix("_scale_inv")] = weight_NK * scales[: weight_NK.shape[0], : weight_NK.shape[1]]
    for name in [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]:
        words, scales = tensors.pop(f"{name}_packed"), tensors.pop(f"{name}_scale").float()
        n_rows, n_columns = tensors.pop(f"{name}_shape").tolist()
        tensors[name] = torch.empty(n_rows, n_columns)
        for column in range(n_columns):
            codes = (words[:, column // 8] >> (4 * (column % 8))) & 15
            tensors[name][:, column] = (codes - 8) * scales[:, column // INT4_GROUP]
    shutil.copytree(hf_folder, out_folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    exact = {n: x.bfloat16().float() if ".experts." in n else x.float() for n, x in tensors.items()}
    _write_float_checkpoint(out_folder, exact)
    return out_folder


def dequantised_tensors(gguf_path: Path) -> dict[str, np.ndarray]:
    """f32 values under stock names: groups joined, experts in the checkpoint's order."""
    reader = gguf.GGUFReader(gguf_path)
    groups: dict[str, dict[int, np.ndarray]] = {}
    for tensor in reader.tensors:
        match = re.fullmatch(r"(.*_exps)\.g(\d+)(\.weight)", tensor.name)
        name, group = (match[1] + match[3], int(match[2])) if match else (tensor.name, 0)
        shape = tuple(int(extent) for extent in reversed(tensor.shape))
        groups.setdefault(name, {})[group] = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    tensors = {}
    for name, parts in groups.items():
        assert sorted(parts) == list(range(len(parts))), name
        value = np.concatenate([parts[group] for group in sorted(parts)]) if len(parts) > 1 else parts[0]
        order = reader.get_field(f"moe2gguf.expert_order.{layer_of(name)}")
        if order is not None and expert_axis(name) == 0:
            in_checkpoint_order = np.empty_like(value)
            in_checkpoint_order[order.contents()] = value
            value = in_checkpoint_order
        tensors[name] = value
    return tensors


def _float_shapes(hf_folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the checkpoint as it would be without quantisation."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(hf_folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            shapes |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    for name in [name for name in shapes if name.endswith("_blocks")]:
        n_expert, n_out, n_block, n_byte = shapes.pop(name)
        del shapes[name.removesuffix("_blocks") + "_scales"]
        shapes[name.removesuffix("_blocks")] = (n_expert, n_block * n_byte * 2, n_out)
    for name in [name for name in shapes if name.endswith("_scale_inv")]:
        del shapes[name]
    for name in [name.removesuffix("_packed") for name in shapes if name.endswith("_packed")]:
        n_rows, n_words = shapes.pop(f"{name}_packed")
        del shapes[f"{name}_scale"], shapes[f"{name}_shape"]
        shapes[name] = (n_rows, 8 * n_words)
    return dict(sorted(shapes.items()))


def _converted(hf_folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / hf_folder.name
        shutil.copytree(hf_folder, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        _write_float_checkpoint(folder, {name: tensor.float() for name, tensor in tensors.items()})
        return {tensor.name: _load(tensor) for tensor in open_source(folder).tensors}


def _load(tensor: SourceTensor) -> np.ndarray:
    try:
        return tensor.load()
    except SourceError:  # the exponential of a number
        return np.full(tensor.shape, np.inf, np.float32)


def _float_tensor(hf_folder: Path, name: str) -> np.ndarray:
    for file in hf_folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            if name in shard.keys():  # noqa: SIM118
                return shard.get_tensor(name).float().numpy()
    raise AssertionError(f"no {name} in {hf_folder}")


def _write_float_checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert all(tensor.numel() < FIRST_NUMBER for tensor in tensors.values())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
