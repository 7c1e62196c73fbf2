"""The walk with error feedback over the groups of a sub-block, for several scales: the plain one.

What computes in its place, on CPU and GPU, is in moe2gguf_kernels; moe2gguf.backend chooses.

Shapes: E experts, N rows, T weights of a sub-block, W weights of a group, C codes of a sub-block, J scales tried,
L = J * N lanes, G codes there are.
"""

from dataclasses import dataclass

import torch

from moe2gguf.codec import SIGN_WEIGHTS, Codec

# distances to all codes are computed for so many at a time: they should stay in the cache
CHUNK_DISTANCES = 1 << 18


@dataclass(frozen=True)
class Tries:
    """Scales for one sub-block, as the file can hold them."""

    scale_JEN: torch.Tensor
    offset_JEN: torch.Tensor | None = None
    sub_JEN: torch.Tensor | None = None  # i32, what the file says for them
    minimum_JEN: torch.Tensor | None = None  # i32


@dataclass(frozen=True)
class Walked:
    """What the try of least loss chose and left behind."""

    code_CEN: torch.Tensor  # i32
    negative_TEN: torch.Tensor | None  # bool; None where the type has no signs
    error_TEN: torch.Tensor  # (w - ŵ) U⁻¹
    loss_EN: torch.Tensor  # the errors' squares
    tried_EN: torch.Tensor  # i64, which try it was


def walk(codec: Codec, target_TEN: torch.Tensor, tries: Tries, factor_ETT: torch.Tensor) -> Walked:
    """Codes towards the target, each group moved by the errors before it times their rows of U.

    factor_ETT: upper triangular. Of equals the first try.
    """
    n_tries = len(tries.scale_JEN)
    scale_EL = tries.scale_JEN.transpose(0, 1).flatten(1)
    left_TEL = target_TEN.repeat(1, 1, n_tries)
    if tries.offset_JEN is not None:
        left_TEL -= tries.offset_JEN.transpose(0, 1).flatten(1)
    step = SIGN_WEIGHTS if codec.has_even_signs else codec.width
    error_TEL = torch.empty_like(left_TEL)
    codes: list[torch.Tensor] = []
    negatives: list[torch.Tensor] = []
    for start in range(0, len(target_TEN), step):
        own = slice(start, start + step)
        factor_EWW = factor_ETT[:, own, own]
        code, negative, level_WEL = _nearest(codec, left_TEL[own], scale_EL, factor_EWW)
        codes.append(code)
        if negative is not None:
            negatives.append(negative)
        error_TEL[own] = whitened(factor_EWW, left_TEL[own] - scale_EL * level_WEL)
        feed_back(left_TEL[own.stop :], error_TEL[own], factor_ETT[:, own, own.stop :])
    loss_EL = error_TEL.square().sum(0)
    tried_EN = loss_EL.unflatten(1, (n_tries, -1)).argmin(1)
    lane_EN = tried_EN * tried_EN.shape[1] + torch.arange(tried_EN.shape[1], device=tried_EN.device)

    def best(x_XEL: torch.Tensor) -> torch.Tensor:
        return x_XEL.gather(2, lane_EN.expand(len(x_XEL), -1, -1))

    return Walked(
        best(torch.cat(codes)),
        best(torch.cat(negatives)) if negatives else None,
        best(error_TEL),
        best(loss_EL[None])[0],
        tried_EN,
    )


def _nearest(
    codec: Codec, target_WEL: torch.Tensor, scale_EL: torch.Tensor, factor_EWW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The codes and signs whose levels, scaled, are nearest: i32 (W / width, E, L), bool (W, E, L), levels f32."""
    codebook_GW = codec.codebook_GW.to(target_WEL.device)
    if codec.width == 1:
        code_EL, level_EL = nearest_level(codebook_GW[:, 0], target_WEL[0], scale_EL)
        return code_EL[None], None, level_EL[None]
    cost_WE = factor_EWW.diagonal(dim1=-2, dim2=-1).T ** -2
    if not codec.has_signs:
        code_EL = _nearest_code(codebook_GW, target_WEL, scale_EL, cost_WE)
        return code_EL[None], None, codebook_GW[code_EL.long()].permute(2, 0, 1)
    negative_WEL = target_WEL < 0
    if codec.has_even_signs:
        # min, not argmin, which is slow across rows
        cheapest = (target_WEL.square() * cost_WE[..., None]).min(0, keepdim=True).indices
        odd = negative_WEL.sum(0, keepdim=True) % 2 == 1
        negative_WEL = negative_WEL.scatter(0, cheapest, negative_WEL.gather(0, cheapest) ^ odd)
    upright_WEL = torch.where(negative_WEL, -target_WEL, target_WEL)
    parts = [
        _nearest_code(codebook_GW, upright_WEL[i : i + codec.width], scale_EL, cost_WE[i : i + codec.width])
        for i in range(0, len(target_WEL), codec.width)
    ]
    level_WEL = torch.cat([codebook_GW[code.long()].permute(2, 0, 1) for code in parts])
    return torch.stack(parts), negative_WEL, torch.where(negative_WEL, -level_WEL, level_WEL)


def nearest_level(
    levels_G: torch.Tensor, target: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> codes i32 and their levels, of the target's shape."""
    # a zero scale decodes to zero whatever the code
    quotient = torch.where(scale != 0, target / scale, 0.0)
    low, high = float(levels_G[0]), float(levels_G[-1])
    if high - low == len(levels_G) - 1:  # consecutive integers
        level = quotient.round_().clamp_(low, high)
        return (level - low).int(), level
    ordered_G, order_G = levels_G.sort()
    place = torch.bucketize(quotient, (ordered_G[1:] + ordered_G[:-1]) / 2)
    return order_G[place].int(), ordered_G[place]


def _nearest_code(
    codebook_GW: torch.Tensor, target_WEL: torch.Tensor, scale_EL: torch.Tensor, cost_WE: torch.Tensor
) -> torch.Tensor:
    """argmin over g of sum_w cost * (target - scale * codebook[g])², i32 (E, L). Scales are positive."""
    # divided by the scale and without what no code changes: scale * sum_w cost * code² - 2 sum_w cost * target * code
    square_EG = cost_WE.T @ codebook_GW.square().T
    book_EXG = torch.cat([codebook_GW.T.expand(len(square_EG), -1, -1), square_EG[:, None]], 1)
    lanes_EXL = torch.cat([-2 * target_WEL * cost_WE[..., None], scale_EL[None]]).transpose(0, 1)
    n_experts, n_lanes = scale_EL.shape
    code_EL = torch.empty((n_experts, n_lanes), dtype=torch.int32, device=target_WEL.device)
    chunk = max(1, CHUNK_DISTANCES // len(codebook_GW))
    for e in range(n_experts):
        for lanes in range(0, n_lanes, chunk):
            code_EL[e, lanes : lanes + chunk] = _argmin(lanes_EXL[e, :, lanes : lanes + chunk].T @ book_EXG[e])
    return code_EL


def _argmin(distance_LG: torch.Tensor) -> torch.Tensor:
    # on CPU numpy's is several times as fast as torch's
    return torch.from_numpy(distance_LG.numpy().argmin(-1)) if distance_LG.is_cpu else distance_LG.argmin(-1)


def chosen(x_JEN: torch.Tensor, tried_EN: torch.Tensor) -> torch.Tensor:
    return x_JEN.gather(0, tried_EN[None])[0]


def feed_back(left_KEL: torch.Tensor, error_WEL: torch.Tensor, factor_EWK: torch.Tensor) -> None:
    """left -= errorᵀ @ factor, in place."""
    if len(left_KEL):
        left_KEL.permute(1, 0, 2).baddbmm_(factor_EWK.mT, error_WEL.permute(1, 0, 2), alpha=-1)


def whitened(factor_ESS: torch.Tensor, x_SEN: torch.Tensor) -> torch.Tensor:
    """x U⁻¹, whose squares are what an error costs."""
    return torch.linalg.solve_triangular(factor_ESS.mT, x_SEN.transpose(0, 1), upper=False).transpose(0, 1)


def product(matrix_EST: torch.Tensor, x_TEN: torch.Tensor) -> torch.Tensor:
    """Expert by expert, f32 (S, E, N)."""
    return torch.bmm(matrix_EST, x_TEN.transpose(0, 1)).transpose(0, 1)
