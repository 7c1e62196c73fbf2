"""A stacked expert tensor passes 2^31 weights: addresses are computed in 64 bits."""

import ast
import mmap
from pathlib import Path

import pytest
import torch

import moe2gguf_kernels
from moe2gguf import backend
from moe2gguf.codec import CODECS
from moe2gguf.ggml import QuantType
from moe2gguf_kernels.moments import moments
from moe2gguf_kernels.walk import walk
from tests.walks import factor

FAR = 2**31 + 64
FILES = sorted(Path(moe2gguf_kernels.__file__).parent.glob("*.py"))


def spread(near: torch.Tensor) -> torch.Tensor:
    """The same values with FAR elements from each first index to the next. On CPU only pages that are used exist."""
    n_elements = (len(near) - 1) * FAR + near[0].numel()
    if near.is_cuda:
        storage = torch.zeros(n_elements, dtype=near.dtype, device=near.device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        storage = torch.frombuffer(mmap.mmap(-1, n_elements * near.itemsize, flags=flags), dtype=near.dtype)
    return storage.as_strided(near.shape, (FAR, *near.stride()[1:])).copy_(near)


def test_moments_of_far_tokens_into_far_experts(device: torch.device) -> None:
    x_TK = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    token_n, offset_E1, weight_n = (
        x.to(device) for x in (torch.tensor([1, 0, 1]), torch.tensor([0, 1, 3]), torch.ones(3))
    )
    expected_EKK = moments(x_TK, token_n, offset_E1, weight_n)
    total_EKK = spread(torch.zeros_like(expected_EKK))
    moments(spread(x_TK), token_n, offset_E1, weight_n, total_EMK=total_EKK)
    assert torch.equal(total_EKK, expected_EKK)


@pytest.mark.parametrize("name", ["Q2_K", "IQ2_XS"])
def test_walk_with_far_factors(name: str, device: torch.device) -> None:
    codec, layout = CODECS[QuantType[name]], backend.layout(QuantType[name], device)
    target_TEN = torch.randn(codec.sub_weights, 2, 3, generator=torch.Generator().manual_seed(0)).to(device)
    scale_JEN = torch.full((1, 2, 3), 0.1, device=device)
    factor_ETT = factor(codec.sub_weights, 2).contiguous().to(device)
    near, far = (walk(target_TEN, scale_JEN, None, x, layout, 512) for x in (factor_ETT, spread(factor_ETT)))
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_programs_and_strides_are_of_64_bits(path: Path) -> None:
    """For the sizes that no test has the memory for: what is multiplied into an address starts out as i64."""
    tree = ast.parse(path.read_text())
    programs = [node for node in ast.walk(tree) if ast.unparse(node).startswith("tl.program_id(")]
    widened = [node for node in ast.walk(tree) if ast.unparse(node).endswith(".to(tl.int64)")]
    calls = {ast.unparse(node) for node in programs if isinstance(node, ast.Call)}
    assert {call for call in calls if call.count("(") == 1} == {
        ast.unparse(node).removesuffix(".to(tl.int64)")
        for node in widened
        if isinstance(node, ast.Call) and ast.unparse(node).startswith("tl.program_id(")
    }
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and any(node in programs for node in ast.walk(function)):
            for argument in function.args.args:
                kind = "" if argument.annotation is None else ast.unparse(argument.annotation)
                is_small = kind == "tl.constexpr" or argument.arg == "n_tries"
                assert kind == "tl.int64" or is_small or argument.arg.endswith("_ptr")
