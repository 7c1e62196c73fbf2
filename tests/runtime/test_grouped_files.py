"""Files with grouped experts: the same logits as the plain file, and refused with a sentence when malformed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from moe2gguf.runtime import tool
from tests.runtime.evaluate import CANNOT_LOAD
from tests.runtime.ops import Type
from tests.runtime.tiny_gguf import N_EMBD, N_EXPERT, N_FF, expert_matrices, write_model

ROOT = Path(__file__).parents[2]
THREE_GROUPS = (3, 4, 1)  # one of a single expert


def evaluate(model: Path, *options: str) -> tuple[np.ndarray, str]:
    """(logits, lines about buffers), computed in a child process."""
    target = model.with_suffix(".npy")
    result = run_child(model, target, *options)
    assert result.returncode == 0, (result.returncode, result.stdout, result.stderr)
    return np.load(target), result.stdout


def run_child(model: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.runtime.evaluate", model, target, *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("arch", "type", "options"),
    [
        # gate and up apart
        ("qwen3moe", Type.Q4_0, ()),
        ("qwen3moe", Type.Q4_0, ("mmap",)),
        ("qwen3moe", Type.Q4_0, ("repack",)),
        ("qwen3moe", Type.Q4_0, ("mmap", "repack")),
        ("qwen3moe", Type.Q4_K, ("mmap",)),
        ("qwen3moe", Type.Q4_K, ("mmap", "repack")),
        # no repacked kernel on x86, the tiled one for many tokens
        ("qwen3moe", Type.Q3_K, ("mmap", "repack")),
        ("qwen3moe", Type.F16, ("mmap",)),
        # gate and up fused
        ("cohere2moe", Type.Q4_K, ("mmap",)),
        ("cohere2moe", Type.Q4_K, ("repack",)),
        # biases
        ("gpt-oss", Type.Q4_K, ("mmap",)),
        ("gpt-oss", Type.Q4_0, ("repack",)),
    ],
)
def test_split_file_has_the_same_logits(ops, tmp_path, arch, type, options) -> None:
    plain, _ = evaluate(write_model(tmp_path / "plain.gguf", ops, arch=arch, groups=[(type, N_EXPERT)]), *options)
    # not the group of one expert here: it is computed by another kernel, with other rounding, where repacked
    sizes = (3, 3, 2) if "repack" in options else THREE_GROUPS
    grouped, buffers = evaluate(
        write_model(tmp_path / "grouped.gguf", ops, arch=arch, groups=[(type, n) for n in sizes]), *options
    )
    assert np.isfinite(plain).all()
    assert plain.std() > 0.01  # a model that computes something
    assert ("CPU_Mapped" in buffers) == ("mmap" in options)
    if "repack" in options and type in (Type.Q4_0, Type.Q4_K):
        assert "CPU_REPACK" in buffers
    np.testing.assert_array_equal(grouped, plain)


@pytest.mark.parametrize("options", [("mmap",), ("repack",)], ids="+".join)
def test_mixed_types_equal_their_decoded_weights(ops, tmp_path, options) -> None:
    """Groups of several vec-dot types against one F32 tensor with the same values, decoded by gguf-py."""
    groups = [(Type.Q8_0, 2), (Type.Q6_K, 2), (Type.Q4_K, 2), (Type.F16, 1), (Type.F32, 1)]
    path = write_model(tmp_path / "mixed.gguf", ops, groups=groups)
    decoded: dict[str, list[np.ndarray]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if "_exps.g" in tensor.name:
            plain_name = tensor.name.split(".g")[0] + ".weight"
            decoded.setdefault(plain_name, []).append(gguf.dequantize(tensor.data, tensor.tensor_type))
    exact_path = write_model(
        tmp_path / "f32.gguf",
        ops,
        rename=dict.fromkeys(decoded, ""),
        extra={name: np.concatenate(parts) for name, parts in decoded.items()},
    )
    logits, exact = evaluate(path, *options)[0], evaluate(exact_path, *options)[0]
    error_T = np.linalg.norm(logits - exact, axis=1) / np.linalg.norm(exact, axis=1)
    # Activations are rounded to 8 bits, which puts a file of one type as far off (Q4_K: 2.6 %). A token or two may
    # be sent to another expert by that; a wrong row would put many off by tens of per cent.
    assert np.quantile(error_T, 0.95) < 0.03


@pytest.mark.parametrize("arch", ["qwen3moe", "cohere2moe", "gpt-oss"])
def test_mixed_types_equal_the_same_values_in_one_type(ops, tmp_path, arch) -> None:
    """Q4_0 and Q5_0 are Q8_0 with fewer levels: the same integers and scales in one ordinary tensor.

    Both files round the activations to Q8_0, so that only the order of float sums can differ.
    """
    path = write_model(tmp_path / "mixed.gguf", ops, arch=arch, groups=[(Type.Q4_0, 3), (Type.Q8_0, 1), (Type.Q5_0, 4)])
    as_q8: dict[str, list[np.ndarray]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if "_exps.g" in tensor.name:
            as_q8.setdefault(tensor.name.split(".g")[0], []).append(to_q8_0(tensor))
    blocks = {name: np.concatenate(parts) for name, parts in as_q8.items()}
    plain = write_model(tmp_path / "plain.gguf", ops, arch=arch, blocks=(Type.Q8_0, blocks))
    mixed, expected = evaluate(path)[0], evaluate(plain)[0]
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-3 * expected.std())


def to_q8_0(tensor: gguf.ReaderTensor) -> np.ndarray:
    """uint8 (E, N, bytes): the experts of a Q4_0, Q5_0 or Q8_0 tensor, none of their values changed."""
    data_ENB = np.asarray(tensor.data)
    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    scales = data_ENB.reshape(*data_ENB.shape[:2], -1, block_bytes)[..., :2]
    values = gguf.dequantize(data_ENB, tensor.tensor_type).reshape(*scales.shape[:-1], 32)
    with np.errstate(invalid="ignore"):  # 0 / 0
        levels = np.nan_to_num(values / scales.view(np.float16).astype(np.float32))
    assert np.abs(levels - levels.round()).max() < 1e-3
    blocks = np.concatenate([scales, levels.round().astype(np.int8).view(np.uint8)], axis=-1)
    return blocks.reshape(*data_ENB.shape[:2], -1)


LORA_RANK = 4


def write_lora(path: Path, arch: str, *, first_group: str, n_expert: int = N_EXPERT) -> Path:
    """An adapter to all expert matrices, of N_EXPERT experts each. FIRST_GROUP follows their name: ".g0" for those of a
    grouped file."""
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, LORA_RANK)
    for name, weight_ENK in expert_matrices(arch, 0).items():
        e, n, k = n_expert, *weight_ENK.shape[1:]
        a_ERK = rng.standard_normal((e, LORA_RANK, k), dtype=np.float32) / np.float32(np.sqrt(k))
        b_ENR = rng.standard_normal((e, n, LORA_RANK), dtype=np.float32) / np.float32(np.sqrt(LORA_RANK))
        writer.add_tensor(f"{name}{first_group}.weight.lora_a", a_ERK)
        writer.add_tensor(f"{name}{first_group}.weight.lora_b", b_ENR)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", ["qwen3moe", "cohere2moe"])
def test_lora_on_grouped_experts(ops, tmp_path, arch) -> None:
    """An adapter has one tensor for all experts, in the file's order. It names the first group."""
    plain = write_model(tmp_path / "plain.gguf", ops, arch=arch, groups=[(Type.Q4_K, N_EXPERT)])
    split = write_model(tmp_path / "grouped.gguf", ops, arch=arch, groups=[(Type.Q4_K, n) for n in THREE_GROUPS])
    plain_lora = write_lora(tmp_path / "plain.lora.gguf", arch, first_group="")
    split_lora = write_lora(tmp_path / "grouped.lora.gguf", arch, first_group=".g0")
    expected = evaluate(plain, f"lora={plain_lora}")[0]
    assert np.abs(expected - evaluate(plain)[0]).max() > 0.1 * expected.std()  # it does something
    np.testing.assert_array_equal(evaluate(split, f"lora={split_lora}")[0], expected)


def test_lora_of_the_plain_file_is_refused(ops, tmp_path) -> None:
    """Its experts may be in another order."""
    path = write_model(tmp_path / "grouped.gguf", ops, groups=grouped(3))
    lora = write_lora(tmp_path / "lora.gguf", "qwen3moe", first_group="")
    result = run_child(path, tmp_path / "logits.npy", f"lora={lora}")
    assert result.returncode == CANNOT_LOAD
    assert "LoRA tensor 'blk.0.ffn_down_exps.weight' does not exist in base model" in result.stdout


def test_lora_of_the_first_group_alone_is_refused(ops, tmp_path) -> None:
    """Its name says so, but it is asked for experts of all groups."""
    path = write_model(tmp_path / "grouped.gguf", ops, groups=grouped(3))
    lora = write_lora(tmp_path / "lora.gguf", "qwen3moe", first_group=".g0", n_expert=N_EXPERT - 2)
    result = run_child(path, tmp_path / "logits.npy", f"lora={lora}")
    assert result.returncode == CANNOT_LOAD
    assert f"_exps.g0.weight' is of 6 and 6 experts, the model has {N_EXPERT}" in result.stdout


def grouped(n_groups: int) -> list[tuple[Type, int]]:
    return [(Type.F16, N_EXPERT - n_groups + 1)] + [(Type.F16, 1)] * (n_groups - 1)


def matrices(n_experts: int, n: int = N_FF, k: int = N_EMBD) -> np.ndarray:
    return np.zeros((n_experts, n, k), np.float32)


GATE = "blk.0.ffn_gate_exps"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        pytest.param(
            {"rename": {f"{GATE}.g2.weight": ""}},
            f"the groups of tensor '{GATE}.weight' hold 7 experts, expected 8",
            id="too few experts",
        ),
        pytest.param(
            {"extra": {f"{GATE}.g3.weight": matrices(1)}},
            f"the groups of tensor '{GATE}.weight' hold 9 experts, expected 8",
            id="too many experts",
        ),
        pytest.param(
            {"rename": {f"{GATE}.g1.weight": f"{GATE}.g5.weight"}},
            f"tensor '{GATE}.g2.weight' found, but there is no group 1 before it",
            id="a gap in the numbers",
        ),
        pytest.param(
            {"rename": {f"{GATE}.g0.weight": f"{GATE}.g6.weight"}},
            f"tensor '{GATE}.g1.weight' found, but there is no group 0 before it",
            id="no group 0",
        ),
        pytest.param(
            {"groups": grouped(8)},
            f"the experts of tensor '{GATE}.weight' are spread over more than 7 groups",
            id="eight groups",
        ),
        pytest.param({"extra": {f"{GATE}.g12.weight": matrices(1)}}, "wrong number of tensors", id="a group far away"),
        pytest.param(
            {"extra": {f"{GATE}.weight": matrices(N_EXPERT)}},
            f"tensor '{GATE}.weight' found both as a single tensor and as groups",
            id="plain and grouped",
        ),
        pytest.param(
            {"rename": {f"{GATE}.g2.weight": ""}, "extra": {f"{GATE}.g2.weight": matrices(1, N_FF // 2)}},
            f"tensor '{GATE}.g2.weight' has wrong shape",
            id="wrong rows",
        ),
        pytest.param(
            {"rename": {f"{GATE}.g2.weight": ""}, "extra": {f"{GATE}.g2.weight": matrices(1)[None]}},
            "ok",
            id="a fourth dimension of 1 is no other shape",
        ),
        pytest.param(
            {"rename": {f"{GATE}.g2.weight": ""}, "extra": {f"{GATE}.g2.weight": matrices(1, N_FF, N_EMBD)[0, 0]}},
            f"tensor '{GATE}.g2.weight' has wrong shape",
            id="one dimension",
        ),
        pytest.param(
            {"rename": {f"{GATE}.g{i}.weight": "" for i in range(3)}},
            f"tensor '{GATE}.weight' not found",
            id="no experts",
        ),
        pytest.param(
            {"suffix": "+grouped+grouped"},
            "unknown model architecture: 'qwen3moe+grouped+grouped'",
            id="suffix twice",
        ),
        pytest.param(
            {"arch": "qwen9moe", "suffix": "+grouped"},
            "unknown model architecture: 'qwen9moe+grouped'",
            id="unknown architecture",
        ),
    ],
)
def test_malformed(ops, tmp_path, model, sentence) -> None:
    path = write_model(tmp_path / "model.gguf", ops, **{"groups": grouped(3), **model})
    result = run_child(path, tmp_path / "logits.npy")
    if sentence == "ok":
        assert result.returncode == 0, result.stdout
        return
    assert result.returncode == CANNOT_LOAD, (result.returncode, result.stdout, result.stderr)
    assert sentence in result.stdout


def test_groups_without_the_suffix_are_not_looked_at(ops, tmp_path) -> None:
    """One place says that a file is grouped. Without it the file is as unreadable as in an unpatched llama.cpp."""
    rename = {}
    path = write_model(tmp_path / "grouped.gguf", ops, groups=grouped(3))
    for tensor in gguf.GGUFReader(path).tensors:
        rename[tensor.name] = tensor.name
    path.write_bytes(path.read_bytes().replace(b"qwen3moe+grouped", b"qwen3moe-grouped"))
    result = run_child(path, tmp_path / "logits.npy")
    assert result.returncode == CANNOT_LOAD
    assert "unknown model architecture: 'qwen3moe-grouped'" in result.stdout


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(tool(name)), *map(str, arguments)], capture_output=True, text=True)


def test_quantize_refuses_a_grouped_file(ops, tmp_path) -> None:
    path = write_model(tmp_path / "model.gguf", ops, groups=grouped(3))
    result = run_tool("llama-quantize", path, tmp_path / "out.gguf", "Q4_0")
    assert result.returncode == 1  # not a signal
    assert "cannot quantize a model of architecture 'qwen3moe+grouped'" in result.stdout + result.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_quantize_takes_a_plain_file(ops, tmp_path) -> None:
    path = write_model(tmp_path / "model.gguf", ops)
    assert run_tool("llama-quantize", path, tmp_path / "out.gguf", "Q8_0").returncode == 0
    assert np.isfinite(evaluate(tmp_path / "out.gguf")[0]).all()


def test_split_and_merge_keep_a_grouped_file(ops, tmp_path) -> None:
    path = write_model(tmp_path / "model.gguf", ops, groups=grouped(3))
    expected, _ = evaluate(path)
    assert run_tool("llama-gguf-split", "--split", "--split-max-tensors", 9, path, tmp_path / "part").returncode == 0
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 1
    np.testing.assert_array_equal(evaluate(parts[0])[0], expected)
    assert run_tool("llama-gguf-split", "--merge", parts[0], tmp_path / "merged.gguf").returncode == 0
    np.testing.assert_array_equal(evaluate(tmp_path / "merged.gguf")[0], expected)
