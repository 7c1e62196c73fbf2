"""The new op against plain MUL_MAT_ID: the same experts, unmerged, must give the same bits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import gguf
import numpy as np
import pytest

from tests.runtime.ops import Group, Ops, Type

# E experts, N out features, K in features, T tokens, U experts used per token
E, N, K, U = 12, 64, 512, 4

MIXES = [
    # one vec-dot type (Q8_K), repacked and plain
    ((Type.Q2_K, 4), (Type.Q3_K, 4), (Type.Q4_K, 4)),
    # four vec-dot types: Q8_0, Q8_K, F16, F32; the activations are quantised anew for each
    ((Type.Q4_0, 3), (Type.Q4_K, 3), (Type.F16, 3), (Type.F32, 3)),
    # a group of one expert is 2-D to ggml, which the repacked kernels do not take
    ((Type.Q4_0, 11), (Type.Q8_0, 1)),
    ((Type.Q4_0, 1), (Type.Q4_0, 11)),
    # as many groups as there can be
    (
        (Type.IQ2_XXS, 1),
        (Type.IQ3_S, 2),
        (Type.Q2_K, 1),
        (Type.Q4_K, 2),
        (Type.Q5_K, 2),
        (Type.Q6_K, 2),
        (Type.Q8_0, 2),
    ),
    # types with activations quantised to Q8_1
    ((Type.Q4_1, 6), (Type.BF16, 6)),
    # one tensor: a plain MUL_MAT_ID
    ((Type.Q4_K, 12),),
    ((Type.F16, 12),),
]
# what the CPU computes with
TYPES = [
    *(Type.F32, Type.F16, Type.BF16),
    *(Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.MXFP4, Type.TQ1_0, Type.TQ2_0),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K),
    *(Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S),
    *(Type.IQ4_NL, Type.IQ4_XS),
]
N_TOKENS = [
    1,  # decoding
    3,
    70,  # more rows of an expert than any kernel takes at a time, and the batch floor of the tiled kernels
    512,  # a full ubatch
]


def mix_id(mix) -> str:
    return "+".join(f"{n}x{type.name}" for type, n in mix)


@pytest.fixture(scope="module")
def weight_ENK() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((E, N, K), dtype=np.float32)


@pytest.fixture(scope="module")
def experts_of(ops, weight_ENK) -> Callable[[Type], Group]:
    """All experts in a type, quantised once."""

    def encode(type: Type) -> Group:
        if type in (Type.IQ1_S, Type.IQ1_M, Type.IQ2_XS, Type.IQ2_S):
            return random_blocks(type)
        return ops.quantize(type, weight_ENK)

    return functools.cache(encode)


def random_blocks(type: Type) -> Group:
    """Any indices into the tables of an IQ type, with a scale of 0.01: ggml takes seconds to prepare to encode."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[type]
    blocks = np.random.default_rng(type).integers(0, 256, (E, N, K // block_size, block_bytes), dtype=np.uint8)
    scale = np.float16(0.01).view(np.uint16)
    if type == Type.IQ1_M:  # a nibble at the top of each of the last four 16-bit words
        words = blocks[..., -8:].view(np.uint16)
        words &= 0x0FFF
        words |= (scale >> np.array([0, 4, 8, 12], dtype=np.uint16) & 0xF) << 12
    else:
        blocks[..., :2].view(np.uint16)[...] = scale
    return Group(type, blocks.reshape(E, N, -1))


def draw_ids(rng: np.random.Generator, n_tokens: int, experts: np.ndarray) -> np.ndarray:
    """(T, U) i32: U distinct EXPERTS per token."""
    return np.stack([rng.permutation(experts)[:U] for _ in range(n_tokens)]).astype(np.int32)


def make_groups(experts_of: Callable[[Type], Group], mix) -> list[Group]:
    first = np.cumsum([0, *(n for _, n in mix)])
    return [Group(type, experts_of(type).blocks[i : i + n]) for i, (type, n) in zip(first, mix, strict=False)]


def unmerged(ops: Ops, groups: list[Group], experts_of, x_TUK, ids_TU, *, repack: bool) -> np.ndarray:
    """What plain MUL_MAT_ID says: each type computes all slots with all experts, each slot keeps its own type's row."""
    y_TUN = np.full((*ids_TU.shape, N), np.nan, dtype=np.float32)
    first = 0
    for group in groups:
        n = len(group.blocks)
        # a lone expert is in a plain buffer, see MIXES
        of_type_TUN = ops.mul_mat_id([experts_of(group.type)], x_TUK, ids_TU, repack=repack and n > 1, upstream=True)
        assert ops.op_name == "MUL_MAT_ID"
        own_TU = (ids_TU >= first) & (ids_TU < first + n)
        y_TUN[own_TU] = of_type_TUN[own_TU]
        first += n
    assert not np.isnan(y_TUN).any()
    return y_TUN


@pytest.mark.parametrize("repack", [False, True], ids=["plain", "repack"])
@pytest.mark.parametrize("n_tokens", N_TOKENS)
@pytest.mark.parametrize("mix", MIXES, ids=mix_id)
def test_groups_equal_unmerged(ops, experts_of, mix, n_tokens, repack) -> None:
    rng = np.random.default_rng(n_tokens)
    groups = make_groups(experts_of, mix)
    ids_TU = draw_ids(rng, n_tokens, np.arange(E))
    for u_x in (1, U):  # activations shared by a token's slots (gate, up), or one row per slot (down)
        x_TUK = rng.standard_normal((n_tokens, u_x, K), dtype=np.float32)
        expected = unmerged(ops, groups, experts_of, x_TUK, ids_TU, repack=repack)
        for n_threads in (1, 2, 5):  # 5 does not divide N
            y_TUN = ops.mul_mat_id(groups, x_TUK, ids_TU, repack=repack, n_threads=n_threads)
            assert ops.op_name == ("MUL_MAT_ID" if len(mix) == 1 else "MUL_MAT_ID_GRP")
            np.testing.assert_array_equal(y_TUN, expected)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_random_mixes_equal_unmerged(ops, experts_of, type) -> None:
    """Each type beside others drawn at random, in groups of random sizes."""
    rng = np.random.default_rng(type)
    for n_tokens, repack in ((1, False), (1, True), (19, True), (40, False)):
        others = [TYPES[i] for i in rng.permutation(len(TYPES)) if TYPES[i] != type]
        n_groups = int(rng.integers(2, 8))
        cuts = np.sort(rng.permutation(np.arange(1, E))[: n_groups - 1])
        types = rng.permutation(np.array([type, *others[: n_groups - 1]])).tolist()
        mix = tuple(zip(map(Type, types), np.diff([0, *cuts, E]).tolist(), strict=True))
        ids_TU = draw_ids(rng, n_tokens, np.arange(E))
        x_TUK = rng.standard_normal((n_tokens, 1, K), dtype=np.float32)
        expected = unmerged(ops, make_groups(experts_of, mix), experts_of, x_TUK, ids_TU, repack=repack)
        assert np.isfinite(expected).all() and expected.std() > 0.1
        y_TUN = ops.mul_mat_id(make_groups(experts_of, mix), x_TUK, ids_TU, repack=repack)
        np.testing.assert_array_equal(y_TUN, expected, err_msg=mix_id(mix))


def test_float_groups_equal_numpy(ops, experts_of, weight_ENK) -> None:
    rng = np.random.default_rng(2)
    groups = make_groups(experts_of, ((Type.F32, 5), (Type.F32, 7)))
    ids_TU = draw_ids(rng, 9, np.arange(E))
    x_TUK = rng.standard_normal((9, U, K), dtype=np.float32)
    expected = np.einsum("tunk,tuk->tun", weight_ENK[ids_TU].astype(np.float64), x_TUK)
    # f32 sums of 512 products of normal noise
    np.testing.assert_allclose(ops.mul_mat_id(groups, x_TUK, ids_TU), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("repack", [False, True], ids=["plain", "repack"])
@pytest.mark.parametrize(
    "experts",
    [
        pytest.param([0, 1, 2, 4, 8, 11], id="experts nobody selects"),
        pytest.param([0, 1, 2, 3, 8, 9], id="no one selects the middle group"),
        pytest.param([8, 9, 10, 11], id="only the last group"),
        pytest.param([0, 1, 2, 3], id="only the first group"),
    ],
)
def test_unselected(ops, experts_of, experts, repack) -> None:
    rng = np.random.default_rng(3)
    groups = make_groups(experts_of, MIXES[0])
    for n_tokens in N_TOKENS:
        ids_TU = draw_ids(rng, n_tokens, np.array(experts))
        x_TUK = rng.standard_normal((n_tokens, 1, K), dtype=np.float32)
        expected = unmerged(ops, groups, experts_of, x_TUK, ids_TU, repack=repack)
        np.testing.assert_array_equal(ops.mul_mat_id(groups, x_TUK, ids_TU, repack=repack), expected)


@pytest.mark.parametrize("repack", [False, True], ids=["plain", "repack"])
@pytest.mark.parametrize("n_tokens", N_TOKENS)
@pytest.mark.parametrize("mix", [MIXES[0], MIXES[1], MIXES[-1]], ids=mix_id)
def test_zero_weight_gives_zero_row(ops, experts_of, mix, n_tokens, repack) -> None:
    rng = np.random.default_rng(4)
    groups = make_groups(experts_of, mix)
    ids_TU = draw_ids(rng, n_tokens, np.arange(E))
    x_TUK = rng.standard_normal((n_tokens, 1, K), dtype=np.float32)
    computed = ops.mul_mat_id(groups, x_TUK, ids_TU, repack=repack)
    for share in (0.0, 0.4, 1.0):  # nothing, some, everything skipped
        weights_TU = rng.uniform(0.1, 1, ids_TU.shape).astype(np.float32)
        skipped_TU = rng.uniform(size=ids_TU.shape) < share
        weights_TU[skipped_TU] = 0
        weights_TU[0, 0] = -0.0  # a zero too
        y_TUN = ops.mul_mat_id(groups, x_TUK, ids_TU, weights_TU, repack=repack)
        expected = np.where((weights_TU == 0)[..., None], np.float32(0), computed)
        np.testing.assert_array_equal(y_TUN, expected)


def test_skipped_expert_is_not_read(ops, weight_ENK) -> None:
    """A slot of weight 0 costs nothing: NaN weights of an expert that only such slots select do not show."""
    poisoned_ENK = weight_ENK.copy()
    poisoned_ENK[7] = np.nan
    groups = [ops.quantize(Type.F32, half_ENK) for half_ENK in (poisoned_ENK[:6], poisoned_ENK[6:])]
    x_TUK = np.ones((2, 1, K), dtype=np.float32)
    ids_TU = np.array([[7, 1, 2, 3], [4, 5, 6, 7]], dtype=np.int32)
    weights_TU = np.where(ids_TU == 7, 0, 0.25).astype(np.float32)
    assert np.isnan(ops.mul_mat_id(groups, x_TUK, ids_TU)).any()
    assert not np.isnan(ops.mul_mat_id(groups, x_TUK, ids_TU, weights_TU)).any()
