"""Error feedback against a slow implementation that inverts the Hessian of the columns left at every step."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from moe2gguf import backend, factors, feedback, ggml
from moe2gguf.codec import CODECS, Codec, Fields
from moe2gguf.feedback import ROW_DAMPING, curvature, quantize, quantize_by_rows, row_feedback
from moe2gguf.ggml import QuantType
from moe2gguf.passes import Blocks
from moe2gguf.walk import product

DAMPING = 0.01
# one of each kind: levels, levels with offsets, signed scales, codebooks without signs, with even, shared and free ones
KINDS = [QuantType[name] for name in ("Q8_0", "MXFP4", "Q2_K", "Q3_K", "IQ4_XS", "IQ1_M", "IQ2_XS", "IQ3_XXS", "IQ3_S")]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def correlated(n_columns: int, power: float, seed: int = 0) -> np.ndarray:
    """A Hessian whose eigenvalues fall as i^-power, in no column's direction; f64 (K, K)."""
    rng = np.random.default_rng(seed)
    basis_KK = np.linalg.qr(rng.standard_normal((n_columns, n_columns)))[0]
    return basis_KK * np.arange(1, n_columns + 1.0) ** -power @ basis_KK.T


def weights(n_rows: int, n_columns: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((n_rows, n_columns)).astype(np.float32)


def fed_back(
    weight_NK: np.ndarray,
    quant_type: QuantType,
    hessian_KK: np.ndarray,
    pool: ThreadPoolExecutor,
    root_KK: np.ndarray | None = None,
) -> np.ndarray:
    """-> blocks uint8 (N, B)"""
    costs = curvature(torch.from_numpy(hessian_KK).float()[None], DAMPING)
    if root_KK is not None:
        costs = dataclasses.replace(costs, root_EKK=torch.from_numpy(root_KK).float()[None])
    return quantize(torch.from_numpy(weight_NK)[None], quant_type, costs, pool)[0].numpy()


def weights_of(codec: Codec, blocks: Blocks) -> torch.Tensor:
    """f32 (S, E, N)"""
    rows = blocks.d_DEN.shape[1:]
    return torch.cat([codec.decode(codec.pack(fields)).T.reshape(-1, *rows) for fields in blocks.fields(codec)])


def damped(hessian_KK: np.ndarray) -> np.ndarray:
    return hessian_KK + DAMPING * hessian_KK.diagonal().mean() * np.eye(len(hessian_KK))


def output_error(blocks_NB: np.ndarray, quant_type: QuantType, weight_NK: np.ndarray, hessian_KK: np.ndarray) -> float:
    """tr(D H Dᵀ)"""
    delta_NK = ggml.decode(blocks_NB, quant_type, weight_NK.shape[1]).astype(np.float64) - weight_NK
    return float(np.einsum("nk,kl,nl->", delta_NK, hessian_KK, delta_NK))


def slow_first_sub_block(
    codec: Codec, weight_NK: np.ndarray, hessian_KK: np.ndarray, blocks_NB: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the first sub-block and what they cost, i64 (N, C) and f64 (N,), for the scale in the file; in f64.

    hessian_KK: of the sub-block's columns and those that may undo their errors.
    """
    size, step = codec.sub_weights, 8 if codec.has_even_signs else codec.width
    fields = codec.unpack(torch.from_numpy(blocks_NB))
    scale_N, offset_N = (x.numpy().astype(np.float64) for x in first_scale(codec, fields))
    left_NK = weight_NK.astype(np.float64)
    codes: list[list[int]] = [[] for _ in left_NK]
    cost_N = np.zeros(len(left_NK))
    for first in range(0, size, step):
        own = slice(first, first + step)
        inverse = np.linalg.inv(hessian_KK[first:, first:])  # of the columns left
        within = np.linalg.inv(inverse[:step, :step])
        undo = within @ inverse[:step, step:]
        cost_W = np.linalg.cholesky(inverse[:step, :step]).T.diagonal() ** -2
        for n, left_K in enumerate(left_NK):
            scale_W = np.full(step, scale_N[n])
            found, level_W = slow_nearest(codec, left_K[own] - offset_N[n], scale_W, cost_W)
            codes[n] += found
            error_W = left_K[own] - offset_N[n] - scale_W * level_W
            cost_N[n] += error_W @ within @ error_W
            # the columns left move to where they minimise (w - ŵ) H (w - ŵ)ᵀ
            left_K[first + step :] -= error_W @ undo
    return np.array(codes), cost_N


def first_scale(codec: Codec, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of the first sub-block, f32 (N,) each."""
    n_rows = len(fields.codes_RC)
    d_N = torch.ones(n_rows) if fields.d_R is None else fields.d_R.float()
    scale_N, offset_N = d_N, torch.zeros(n_rows)
    if fields.sub_RP is not None:
        assert codec.sub_scale_Q is not None
        sub_N = fields.sub_RP[:, 0].long()
        scale_N = d_N * codec.sub_scale_Q[sub_N]
        if codec.sub_offset_Q is not None:
            offset_N = d_N * codec.sub_offset_Q[sub_N]
    if fields.minimum_RP is not None:
        assert fields.dmin_R is not None
        offset_N = -fields.dmin_R.float() * fields.minimum_RP[:, 0]
    return scale_N, offset_N


def slow_nearest(
    codec: Codec, target_W: np.ndarray, scale_W: np.ndarray, cost_W: np.ndarray
) -> tuple[list[int], np.ndarray]:
    sign_W = np.ones(len(target_W))
    if codec.has_signs:
        sign_W = np.where((target_W < 0) != (scale_W < 0), -1.0, 1.0)
        if codec.has_even_signs and (sign_W < 0).sum() % 2:
            sign_W[np.argmin(cost_W * target_W**2)] *= -1
    codes, levels = [], []
    for i in range(0, len(target_W), codec.width):
        part = slice(i, i + codec.width)
        values_GW = scale_W[part] * sign_W[part] * codec.codebook_GW.numpy()
        codes.append(int((cost_W[part] * (target_W[part] - values_GW) ** 2).sum(1).argmin()))
        levels.append(sign_W[part] * codec.codebook_GW[codes[-1]].numpy())
    return codes, np.concatenate(levels)


def first_pass_as_chosen(monkeypatch: pytest.MonkeyPatch, sweeps: int = 0) -> None:
    """The blocks' scales stay as they were when the codes were chosen."""
    monkeypatch.setattr("moe2gguf.feedback._sweeps", lambda _: (0, sweeps))
    monkeypatch.setattr("moe2gguf.feedback._near", lambda new, old: torch.zeros_like(new, dtype=torch.bool))


@pytest.mark.parametrize("quant_type", KINDS, ids=lambda t: t.name)
def test_codes_are_those_of_the_slow_implementation(
    quant_type: QuantType, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_pass_as_chosen(monkeypatch)
    codec = CODECS[quant_type]
    weight_NK, hessian_KK = weights(6, 256), correlated(256, 1.0)
    blocks_NB = fed_back(weight_NK, quant_type, hessian_KK, pool)[:, : codec.block_bytes]
    expected_NC, _ = slow_first_sub_block(codec, weight_NK, damped(hessian_KK), blocks_NB)
    found_NC = codec.unpack(torch.from_numpy(blocks_NB)).codes_RC[:, : expected_NC.shape[1]].numpy()
    if quant_type == QuantType.MXFP4:  # two codes of zero
        expected_NC, found_NC = expected_NC % 8 * (expected_NC != 8), found_NC % 8 * (found_NC != 8)
    # f32 against f64: a near tie may fall the other way, and then what follows differs too
    assert (found_NC == expected_NC).mean() > 0.98


@pytest.mark.parametrize("quant_type", [t for t in KINDS if CODECS[t].places.sub is not None], ids=lambda t: t.name)
def test_no_other_scale_near_it_is_better(
    quant_type: QuantType, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the scales that were tried, the chosen one costs least; its neighbours were mostly among them."""
    first_pass_as_chosen(monkeypatch)
    codec = CODECS[quant_type]
    weight_NK, hessian_KK = weights(40, 256), correlated(256, 1.0)
    blocks_NB = fed_back(weight_NK, quant_type, hessian_KK, pool)[:, : codec.block_bytes]
    _, cost_N = slow_first_sub_block(codec, weight_NK, damped(hessian_KK), blocks_NB)
    fields = codec.unpack(torch.from_numpy(blocks_NB))
    assert fields.sub_RP is not None and codec.sub_scale_Q is not None
    for move in (-1, 1):
        sub_RP = (fields.sub_RP + move).clamp(0, len(codec.sub_scale_Q) - 1)
        other_NB = codec.pack(dataclasses.replace(fields, sub_RP=sub_RP)).numpy()
        _, other_N = slow_first_sub_block(codec, weight_NK, damped(hessian_KK), other_NB)
        assert (cost_N <= 1.001 * other_N).mean() >= 0.6
        assert cost_N.mean() <= other_N.mean()


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
@pytest.mark.parametrize(("power", "ratio"), [(0.0, 1.1), (0.5, 0.95), (1.0, 0.6)])
def test_less_error_than_ggml(quant_type: QuantType, power: float, ratio: float, pool: ThreadPoolExecutor) -> None:
    """The more the inputs are correlated, the more can be undone; without correlation, nothing."""
    weight_NK, hessian_KK = weights(64, 512), correlated(512, power)
    plain_NB = ggml.encode(weight_NK, quant_type, hessian_KK.diagonal().astype(np.float32))
    blocks_NB = fed_back(weight_NK, quant_type, hessian_KK, pool)
    plain, found = (output_error(b, quant_type, weight_NK, hessian_KK) for b in (plain_NB, blocks_NB))
    assert found < ratio * plain


@pytest.mark.parametrize("name", ["IQ4_NL", "Q8_0", "MXFP4"])
def test_columns_that_are_no_multiple_of_256(name: str, pool: ThreadPoolExecutor) -> None:
    """Of small blocks several are taken together: here eight, and then one."""
    quant_type, weight_NK, hessian_KK = QuantType[name], weights(64, 288), correlated(288, 1.0)
    plain_NB = ggml.encode(weight_NK, quant_type, hessian_KK.diagonal().astype(np.float32))
    blocks_NB = fed_back(weight_NK, quant_type, hessian_KK, pool)
    assert blocks_NB.shape == plain_NB.shape
    plain, found = (output_error(b, quant_type, weight_NK, hessian_KK) for b in (plain_NB, blocks_NB))
    assert found < 0.6 * plain


def test_scales_of_neighbours_are_fitted_together() -> None:
    """Against least squares over the scales of a row's eight blocks, the columns' root in f64; and none near zero."""
    codec, rng = CODECS[QuantType.IQ4_NL], torch.Generator().manual_seed(0)
    hessian_ESS = torch.from_numpy(correlated(256, 1.0)).float()[None]
    weight_SEN = torch.randn(256, 1, 5, generator=rng)
    blocks, found_SEN, _ = backend.first_pass(codec, weight_SEN, torch.eye(256)[None])
    slope_SEN = product(hessian_ESS, found_SEN - weight_SEN)
    after, after_SEN = feedback._refit(codec, blocks, found_SEN, slope_SEN, hessian_ESS)
    root_SS = np.linalg.cholesky(hessian_ESS[0].double().numpy())
    for n in range(5):
        parts_DS = np.zeros((8, 256))
        for d in range(8):
            parts_DS[d, 32 * d : 32 * d + 32] = found_SEN[32 * d : 32 * d + 32, 0, n].double()
        share_D = np.linalg.lstsq((parts_DS @ root_SS).T, weight_SEN[:, 0, n].double().numpy() @ root_SS)[0]
        expected_D = blocks.d_DEN[:, 0, n].double().numpy() * share_D
        np.testing.assert_allclose(after.d_DEN[:, 0, n].numpy(), expected_D, rtol=2e-3)
    torch.testing.assert_close(after_SEN, weights_of(codec, after), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quant_type", KINDS, ids=lambda t: t.name)
def test_feedback_inside_a_block_is_needed(
    quant_type: QuantType, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, as one reference implementation has it at few bits, the error is much larger."""
    monkeypatch.setattr("moe2gguf.feedback._sweeps", lambda _: (0, 0))
    weight_NK, hessian_KK = weights(64, 512), correlated(512, 1.0)
    root_KK = curvature(torch.from_numpy(hessian_KK)[None], DAMPING).root_EKK[0].double().numpy()
    factor_KK = np.linalg.inv(root_KK)
    size = CODECS[quant_type].block_weights
    inside = np.arange(512)[:, None] // size == np.arange(512) // size
    cut_KK = np.where(inside & ~np.eye(512, dtype=bool), 0, factor_KK)
    whole, cut = (
        output_error(fed_back(weight_NK, quant_type, hessian_KK, pool, r), quant_type, weight_NK, hessian_KK)
        for r in (root_KK, np.linalg.inv(cut_KK))
    )
    assert whole < 0.95 * cut


@pytest.mark.parametrize("quant_type", KINDS, ids=lambda t: t.name)
def test_a_sweep_takes_the_codes_of_the_slow_implementation(
    quant_type: QuantType, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the first sub-block, which finds all others as the first pass left them."""
    codec, n = CODECS[quant_type], CODECS[quant_type].sub_weights
    weight_NK, hessian_KK = weights(24, 256), correlated(256, 1.0)
    first_pass_as_chosen(monkeypatch)
    before_NB = fed_back(weight_NK, quant_type, hessian_KK, pool)
    first_pass_as_chosen(monkeypatch, sweeps=1)
    after_NB = fed_back(weight_NK, quant_type, hessian_KK, pool)
    before_NK, after_NK = (ggml.decode(b, quant_type, 256).astype(np.float64) for b in (before_NB, after_NB))
    own_KK, rest_KK = np.split(damped(hessian_KK)[:n], [n], axis=1)
    # of what the others miss, the first columns can make up for this
    target_NT = weight_NK[:, :n] - (before_NK - weight_NK)[:, n:] @ rest_KK.T @ np.linalg.inv(own_KK)
    before_N, after_N = (
        np.einsum("nk,kl,nl->n", x_NT, own_KK, x_NT)
        for x_NT in (x_NK[:, :n] - target_NT for x_NK in (before_NK, after_NK))
    )
    first_NB = after_NB[:, : codec.block_bytes]
    expected_NC, expected_N = slow_first_sub_block(codec, target_NT, own_KK, first_NB)
    found_NC = codec.unpack(torch.from_numpy(first_NB)).codes_RC[:, : expected_NC.shape[1]].numpy()
    moved_N = (before_NK[:, :n] != after_NK[:, :n]).any(1)
    assert moved_N.mean() > 0.1
    assert (after_N <= before_N * 1.0001).all()
    np.testing.assert_allclose(after_N[moved_N], expected_N[moved_N], rtol=0.02)
    if quant_type != QuantType.MXFP4:  # two codes of zero
        assert (found_NC == expected_NC)[moved_N].mean() > 0.98
    # what stays is no worse than what the walk would have put there with the same scale
    assert (before_N <= expected_N * 1.0001)[~moved_N].all()


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_sweeps_lower_the_error_of_every_row(
    quant_type: QuantType, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_NK, hessian_KK = weights(16, 512), correlated(512, 1.0)
    errors = []
    for sweeps in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        monkeypatch.setattr("moe2gguf.feedback._sweeps", lambda _, sweeps=sweeps: sweeps)
        miss_NK = ggml.decode(fed_back(weight_NK, quant_type, hessian_KK, pool), quant_type, 512) - weight_NK
        errors.append(np.einsum("nk,kl,nl->n", miss_NK, damped(hessian_KK), miss_NK))
    for before, after in ((0, 1), (1, 2), (3, 4)):
        assert (errors[after] <= 1.0001 * errors[before]).all()
    # an early one changes what is asked of all columns after it, for better and worse
    none, late, two_late, early, both = (error_N.sum() for error_N in errors)
    assert late < 0.98 * none
    if CODECS[quant_type].n_subs > 1:
        assert early < 0.99 * none and both < 1.01 * two_late


def test_factors_of_hardly_definite_hessians() -> None:
    """48 tokens of 300 columns, with little damping, and with so little, just held by f32, that rounding undoes it."""
    x_nK = torch.randn(48, 300, generator=torch.Generator().manual_seed(0)).sign()
    for exponent, fails in ((-12, False), (-18, True)):
        hessian_EKK = (x_nK.T @ x_nK)[None] + 2.0**exponent * torch.eye(300)
        with pytest.raises(torch.linalg.LinAlgError) if fails else nullcontext():
            factors._into_root(hessian_EKK.clone())
        root_KK = factors.root(hessian_EKK)[0].double()
        assert not root_KK.tril(-1).any()
        torch.testing.assert_close(root_KK @ root_KK.T, hessian_EKK[0].double(), rtol=0, atol=3e-6 * 48)
        unit_KK = factors.inverse_factor(hessian_EKK)[0].double() @ root_KK
        torch.testing.assert_close(unit_KK, torch.eye(300).double(), rtol=0, atol=0.05)


def test_experts_are_quantised_each_with_its_own_hessian(pool: ThreadPoolExecutor) -> None:
    hessians_EKK = torch.from_numpy(np.stack([correlated(256, 1.0, seed) for seed in range(3)])).float()
    weight_ENK = torch.from_numpy(weights(24, 256).reshape(3, 8, 256))
    costs = curvature(hessians_EKK, DAMPING)
    together = quantize(weight_ENK, QuantType.IQ2_S, costs, pool)
    for e in range(3):
        one = slice(e, e + 1)
        alone = quantize(weight_ENK[one], QuantType.IQ2_S, costs.of([e]), pool)
        assert (together[e] == alone[0]).float().mean() > 0.98  # batched products sum in another order


@pytest.mark.parametrize("quant_type", [QuantType.IQ2_XS, QuantType.Q3_K], ids=lambda t: t.name)
def test_rows_make_up_for_each_other(quant_type: QuantType, pool: ThreadPoolExecutor) -> None:
    """Against the plain way: what is left to do for the rows after a block is solved for in f64, block by block. Of 40
    rows, 13 blocks of 3 and one of 1."""
    weight_NK, hessian_KK = weights(40, 256), correlated(256, 0.5)
    moments_NN = correlated(40, 1.0, 3)
    costs = curvature(torch.from_numpy(hessian_KK).float()[None], DAMPING)
    feedback_ENN = row_feedback(torch.from_numpy(moments_NN).float()[None])
    weight_ENK = torch.from_numpy(weight_NK)[None]
    found_NB = quantize_by_rows(weight_ENK[None], quant_type, costs, feedback_ENN[None], pool)[0, 0].numpy()

    damped_NN = moments_NN + ROW_DAMPING * moments_NN.diagonal().mean() * np.eye(40)
    target_NK, blocks = weight_NK.copy(), []
    for start in range(0, 40, 3):
        own, done, rest = slice(start, start + 3), slice(0, start + 3), slice(start + 3, 40)
        blocks.append(quantize(torch.from_numpy(target_NK[own])[None], quant_type, costs, pool)[0].numpy())
        decoded_NK = ggml.decode(np.concatenate(blocks), quant_type, 256).astype(np.float64)
        error_NK = decoded_NK - weight_NK[done]
        target_NK[rest] = weight_NK[rest] - np.linalg.solve(damped_NN[rest, rest], damped_NN[rest, done] @ error_NK)
    expected_NB = np.concatenate(blocks)
    # a rounding's difference in one row changes what is asked of those after it
    assert (found_NB[:9] == expected_NB[:9]).mean() > 0.98
    plain_NB = quantize(weight_ENK, quant_type, costs, pool)[0].numpy()

    def cost(blocks_NB: np.ndarray) -> float:
        miss_NK = ggml.decode(blocks_NB, quant_type, 256).astype(np.float64) - weight_NK
        return float((moments_NN @ miss_NK @ hessian_KK * miss_NK).sum())

    assert cost(found_NB) == pytest.approx(cost(expected_NB), rel=0.05)
    assert cost(found_NB) < 0.8 * cost(plain_NB)
    # without anything in common there is nothing to make up for
    alone = row_feedback(torch.eye(40)[None])
    alone_NB = quantize_by_rows(weight_ENK[None], quant_type, costs, alone[None], pool)[0, 0].numpy()
    assert (alone_NB == plain_NB).mean() > 0.98  # batched products sum in another order


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_zeros_and_unseen_experts(quant_type: QuantType, pool: ThreadPoolExecutor) -> None:
    """An expert that no token reached has a Hessian of zeros; a row of zeros stays one."""
    weight_NK = weights(4, 256)
    weight_NK[2] = 0
    blocks_NB = fed_back(weight_NK, quant_type, np.zeros((256, 256)), pool)
    decoded_NK = ggml.decode(blocks_NB, quant_type, 256)
    assert np.isfinite(decoded_NK).all()
    assert not decoded_NK[2].any()
    assert np.square(decoded_NK - weight_NK).sum() < 0.6 * np.square(weight_NK).sum()
