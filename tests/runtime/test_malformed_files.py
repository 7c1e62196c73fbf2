"""Headers made wrong one field at a time, which no writer would write, and a few hundred at random.

What is malformed but written by an ordinary writer is in test_grouped_files.py. Thousands at random:
scripts/fuzz_loader.py.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe2gguf.runtime import find_runtime
from tests.runtime.gguf_header import F32, F64, I32, STRING, U32, Header, Tensor, array, scalar, tiny_header
from tests.runtime.load import ROOT, Loader, Request
from tests.runtime.ops import Type
from tests.runtime.tiny_gguf import N_LAYER

GROUPS = [(Type.F16, 5), (Type.Q4_0, 2), (Type.Q8_0, 1)]
GATE, DOWN = "blk.0.ffn_gate_exps", "blk.1.ffn_down_exps"

Change = Callable[[Header], object]


@pytest.fixture(scope="module")
def loader(needs_runtime) -> Iterator[Loader]:
    loader = Loader()
    yield loader
    loader.close()


def check_refused(loader: Loader, path: Path, *fragments: str) -> None:
    """Refused, with a sentence that has all FRAGMENTS."""
    answer = loader.ask(Request(str(path), decode=True))
    assert answer.outcome == "refused"
    assert answer.sentence
    # what is wrong with the container is in the line before llama.cpp's own
    lines = answer.log.lower().splitlines()
    assert any(all(fragment.lower() in line for fragment in fragments) for line in lines), answer.log


def check_computes(loader: Loader, path: Path) -> None:
    answer = loader.ask(Request(str(path), decode=True))
    assert answer.outcome == "computed", answer.log


def sizes(name: str, *ne_by_group: int, ne0: int | None = None) -> Change:
    """Other numbers of experts in the groups of NAME, more groups if there are more numbers."""

    def change(header: Header) -> None:
        first = header.tensor(f"{name}.g0.weight")
        place = header.tensors.index(first)
        header.tensors = [tensor for tensor in header.tensors if not tensor.name.startswith(f"{name}.g".encode())]
        for i, n in enumerate(ne_by_group):
            ne = [first.ne[0] if ne0 is None else ne0, first.ne[1], n]
            header.tensors.insert(place + i, Tensor(f"{name}.g{i}.weight".encode(), ne, first.type))

    return change


def set_type(name: str, type: int) -> Change:
    def change(header: Header) -> None:
        header.tensor(name).type = type

    return change


def set_offset(name: str, offset: int) -> Change:
    def change(header: Header) -> None:
        header.tensor(name).offset = offset

    return change


def swap(one: str, two: str) -> Change:
    def change(header: Header) -> None:
        a, b = header.tensor(one), header.tensor(two)
        a.name, b.name = b.name, a.name

    return change


def rename(name: str, new: str) -> Change:
    def change(header: Header) -> None:
        header.tensor(name).name = new.encode()

    return change


def reverse(header: Header) -> None:
    header.tensors.reverse()


def all_plain(header: Header) -> None:
    while groups := header.groups():
        header.merge(header.siblings(groups[0]), Type.F16)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        # every group counts, in every projection and layer
        pytest.param(
            sizes(GATE, 5, 0, 3), f"tensor '{GATE}.g1.weight' has 0 experts, expected 1 to 8", id="an empty group"
        ),
        pytest.param(sizes(GATE, 5, -1, 4), "dimension 2 has invalid number of elements: -1 < 0", id="a negative size"),
        pytest.param(
            sizes(DOWN, 5, 2), f"groups of tensor '{DOWN}.weight' hold 7 experts, expected 8", id="last layer"
        ),
        pytest.param(
            # the sum is 8 in 64 bits
            sizes(GATE, *[1 << 62] * 4, 8, ne0=0),
            f"tensor '{GATE}.g0.weight' has {1 << 62} experts, expected 1 to 8",
            id="sizes that overflow",
        ),
        pytest.param(sizes(GATE, 1 << 40, 8), f"tensor '{GATE}.", id="a huge group"),
        pytest.param(
            lambda header: header.put("expert_count", scalar(U32, 9)),
            "wrong shape; expected",
            id="a model of 9 experts",
        ),
        pytest.param(
            rename(f"{GATE}.g1.weight", f"{GATE}.g01.weight"),
            f"tensor '{GATE}.g2.weight' found, but there is no group 1 before it",
            id="a number with a zero",
        ),
        pytest.param(
            rename(f"{GATE}.g2.weight", f"{GATE}.g1.weight"), f"duplicate tensor name '{GATE}.g1.weight'", id="twice"
        ),
        pytest.param(
            swap(f"{GATE}.g0.weight", f"{DOWN}.g2.weight"),
            f"groups of tensor '{GATE}.weight' hold 4 experts, expected 8",
            id="groups of two projections swapped",
        ),
        pytest.param(
            rename(f"{GATE}.g2.weight", f"{GATE}.g2.bias"), "hold 7 experts, expected 8", id="a bias in groups"
        ),
        pytest.param(
            rename("blk.0.attn_q.weight", "blk.0.attn_q.g0.weight"),
            "'blk.0.attn_q.weight' not found",
            id="dense groups",
        ),
        pytest.param(set_type(f"{GATE}.g1.weight", 99), "has invalid ggml type 99", id="no such type"),
        pytest.param(set_type(f"{GATE}.g1.weight", -1), "has invalid ggml type -1", id="a negative type"),
        pytest.param(
            set_type(f"{GATE}.g1.weight", Type.I32),
            "failed to find a compatible buffer type",
            id="a type that nothing multiplies with",
        ),
        pytest.param(
            set_offset(f"{GATE}.g1.weight", 64), f"tensor '{GATE}.g1.weight' has offset 64, expected", id="offset"
        ),
        # nothing wrong with these
        pytest.param(swap(f"{GATE}.g0.weight", f"{GATE}.g2.weight"), None, id="sizes and types in another order"),
        pytest.param(reverse, None, id="tensors backwards in the file"),
        pytest.param(sizes(GATE, 1, 7), None, id="other sizes in another projection"),
        pytest.param(sizes(GATE, *[1] * 6, 2), None, id="seven groups"),
        pytest.param(sizes(GATE, 8), None, id="one group"),
        pytest.param(all_plain, None, id="no group at all"),
    ],
)
def test_groups(loader, tmp_path, change, sentence) -> None:
    header = tiny_header(tmp_path, "qwen3moe", GROUPS)
    change(header)
    path = header.write(tmp_path / "model.gguf")
    if sentence is None:
        check_computes(loader, path)
    else:
        check_refused(loader, path, sentence)


def test_fused_gate_and_up_do_not_fall_back(loader, tmp_path) -> None:
    """The fused tensor is optional. Where its groups are not complete, that is said, not that others are missing."""
    header = tiny_header(tmp_path, "cohere2moe", GROUPS)
    sizes("blk.0.ffn_gate_up_exps", 5, 2)(header)
    sentence = "groups of tensor 'blk.0.ffn_gate_up_exps.weight' hold 7 experts, expected 8"
    check_refused(loader, header.write(tmp_path / "model.gguf"), sentence)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_cut_off(loader, tmp_path, kept) -> None:
    header = tiny_header(tmp_path, "qwen3moe", GROUPS)
    size = header.write(tmp_path / "whole.gguf").stat().st_size
    path = header.write(tmp_path / "model.gguf")
    with path.open("r+b") as file:
        file.truncate(int(size * kept))
    check_refused(loader, path, "data is not within the file bounds")


# thresholds of expert skipping

ARRAYS = ("expert_skip_ratio", "expert_skip_protect_norm", "expert_skip_frequency")
STRENGTH = "expert_skip_strength"
VARIABLE = "LLAMA_EXPERT_SKIP"


@pytest.fixture(scope="session")
def can_skip(needs_runtime) -> None:
    library = find_runtime().libraries / "libllama.so"
    if not library.is_file() or ARRAYS[0].encode() not in library.read_bytes():
        pytest.skip("the installed runtime does not skip experts: run `moe2gguf runtime install`")


@pytest.mark.parametrize("key", ARRAYS)
@pytest.mark.parametrize(
    ("value", "found"),
    [
        pytest.param(array(F32, [0.25] * (N_LAYER - 1)), str(N_LAYER - 1), id="too short"),
        pytest.param(array(F32, [0.25] * (N_LAYER + 1)), str(N_LAYER + 1), id="too long"),
        pytest.param(array(F32, []), "0", id="empty"),
        pytest.param(array(F32, [0.25] * 600), "600", id="longer than any model"),
        pytest.param(array(F32, [0.25, math.nan]), "nan", id="NaN"),
        pytest.param(array(F32, [0.25, -0.5]), "-0.5", id="negative"),
        pytest.param(array(F32, [math.inf, 0.25]), "inf", id="infinite"),
        pytest.param(array(F64, [0.25] * N_LAYER), "array of f64, expected an array of f32", id="f64"),
        pytest.param(array(I32, [0] * N_LAYER), "array of i32", id="integers"),
        pytest.param(array(STRING, ["0.25"] * N_LAYER), "array of str", id="strings"),
        pytest.param(scalar(F32, 0.25), "is f32, expected an array", id="no array"),
        pytest.param(scalar(U32, 1), "is u32, expected an array", id="an integer"),
    ],
)
def test_wrong_thresholds(can_skip, loader, tmp_path, key, value, found) -> None:
    header = tiny_header(tmp_path, "qwen3moe", GROUPS)
    header.put(key, value)
    check_refused(loader, header.write(tmp_path / "model.gguf"), "error loading model", f"qwen3moe.{key}", found)


@pytest.mark.parametrize("key", ["expert_skip_ratio", "expert_skip_frequency"])
def test_a_threshold_above_one(can_skip, loader, tmp_path, key) -> None:
    header = tiny_header(tmp_path, "qwen3moe", GROUPS)
    header.put(key, array(F32, [0.25, 1.5]))
    check_refused(loader, header.write(tmp_path / "model.gguf"), "error loading model", key, "1.5")


@pytest.mark.parametrize("strength", [math.nan, math.inf, -1.0])
def test_wrong_strength(can_skip, loader, tmp_path, strength) -> None:
    header = tiny_header(tmp_path, "qwen3moe", GROUPS)
    header.put(ARRAYS[0], array(F32, [0.25] * N_LAYER))
    header.put(STRENGTH, scalar(F32, strength))
    check_refused(loader, header.write(tmp_path / "model.gguf"), "error loading model", STRENGTH)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "x", "1x", "1e999"])
def test_wrong_strength_in_the_environment(can_skip, loader, tmp_path, text) -> None:
    header = tiny_header(tmp_path, "qwen3moe", GROUPS)
    header.put(ARRAYS[0], array(F32, [0.25] * N_LAYER))
    path = header.write(tmp_path / "model.gguf")
    answer = loader.ask(Request(str(path), environment={VARIABLE: text}))
    assert answer.outcome == "refused"
    assert VARIABLE in answer.sentence


def test_right_thresholds(can_skip, loader, tmp_path) -> None:
    """The edges of what is allowed."""
    header = tiny_header(tmp_path, "qwen3moe", GROUPS)
    header.put("expert_skip_ratio", array(F32, [0.0, 1.0]))
    header.put("expert_skip_frequency", array(F32, [1.0, 1e-45]))
    header.put("expert_skip_protect_norm", array(F32, [0.0, 1e30]))
    header.put(STRENGTH, scalar(F32, 0.0))
    check_computes(loader, header.write(tmp_path / "model.gguf"))


@pytest.mark.parametrize("strength", [math.nan, math.inf, -1.0])
def test_wrong_strength_in_an_override(can_skip, loader, tmp_path, strength) -> None:
    header = tiny_header(tmp_path, "qwen3moe", GROUPS)
    header.put(ARRAYS[0], array(F32, [0.25] * N_LAYER))
    path = header.write(tmp_path / "model.gguf")
    answer = loader.ask(Request(str(path), overrides={f"qwen3moe.{STRENGTH}": strength}))
    assert answer.outcome == "refused"
    assert STRENGTH in answer.sentence


def test_headers_damaged_at_random(needs_runtime) -> None:
    """None crashes the library, but where the same crash is upstream's; each refusal has a sentence."""
    command = [sys.executable, "scripts/fuzz_loader.py", "-n", "200", "--seed", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = result.stdout.splitlines()[0]
    assert "loaded" in outcomes and "refused" in outcomes  # neither all harmless nor all hopeless
