"""Quantisation with error feedback onto any GGUF type (block-LDLQ): every code makes up for the errors before it.

The columns are walked in blocks as wide as a code. What a block's error does to the output, the columns after it can
partly undo; by how much is in the Cholesky factor of the inverse Hessian (GPTQ, arXiv:2210.17323, with blocks for
columns as in QuIP#'s LDLQ, arXiv:2402.04396). A block of the file gets its scales when the walk reaches it, from ggml's
search on the weights as they are by then.

Shapes: E experts, N rows, K columns, S weights of a block of the file, W weights of a code, G codes, B bytes.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from moe2gguf import ggml
from moe2gguf.codec import CODECS, SIGN_WEIGHTS, Codec
from moe2gguf.ggml import QuantType

# distances to all codes are computed for so many weights at a time
CHUNK_DISTANCES = 1 << 22


def inverse_factor(hessian_EKK: torch.Tensor, damping: float) -> torch.Tensor:
    """U upper triangular with UᵀU = (H + damping * mean(diag H) * I)⁻¹, f32 (E, K, K), computed in f64."""
    hessian_EKK = hessian_EKK.double()
    mean_E = hessian_EKK.diagonal(dim1=-2, dim2=-1).mean(-1)
    # an expert that nothing was seen of has no Hessian: all columns count alike
    ridge_E = torch.where(mean_E > 0, damping * mean_E, 1.0)
    identity_KK = torch.eye(hessian_EKK.shape[-1], dtype=torch.float64)
    lower = torch.linalg.cholesky(hessian_EKK + ridge_E[:, None, None] * identity_KK)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def quantize(
    weight_ENK: torch.Tensor,
    quant_type: QuantType,
    hessian_EKK: torch.Tensor,
    factor_EKK: torch.Tensor,
    pool: ThreadPoolExecutor,
) -> np.ndarray:
    """The experts' rows in QUANT_TYPE with error feedback: uint8 (E, N, B).

    hessian_EKK: f32, its diagonal weighs columns in the search for scales; factor_EKK: inverse_factor of it.
    """
    codec = CODECS[quant_type]
    n_experts, n_rows, n_columns = weight_ENK.shape
    size = codec.block_weights
    importance_EK = hessian_EKK.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).float().numpy()
    left_ENK = weight_ENK.float().clone()
    parts = []
    for start in range(0, n_columns, size):
        columns = slice(start, start + size)
        blocks_RB, error_ENS = _quantize_block(
            codec, left_ENK[..., columns], importance_EK[:, columns], factor_EKK[:, columns, columns], pool
        )
        parts.append(blocks_RB.reshape(n_experts, n_rows, -1))
        left_ENK[..., start + size :] -= error_ENS @ factor_EKK[:, columns, start + size :]
    return np.concatenate(parts, axis=-1)


def _quantize_block(
    codec: Codec,
    weight_ENS: torch.Tensor,
    importance_ES: np.ndarray,
    factor_ESS: torch.Tensor,
    pool: ThreadPoolExecutor,
) -> tuple[np.ndarray, torch.Tensor]:
    """-> blocks uint8 (E * N, B), and the error in units of U, (w - ŵ) U⁻¹, f32 (E, N, S)."""
    shape = weight_ENS.shape
    jobs = [
        pool.submit(ggml.encode, weight_NS, codec.quant_type, importance_S)
        for weight_NS, importance_S in zip(weight_ENS.numpy(), importance_ES, strict=True)
    ]
    blocks_RB = np.concatenate([job.result() for job in jobs])
    scale_ENS, offset_ENS = (torch.from_numpy(a).reshape(shape) for a in codec.scales(blocks_RB))
    left_ENS = weight_ENS - offset_ENS
    step = SIGN_WEIGHTS if codec.has_even_signs else codec.width
    codes, negatives = [], []
    for first in range(0, shape[-1], step):
        own = slice(first, first + step)
        factor_EWW = factor_ESS[:, own, own]
        # what an error costs that the columns after it undo as far as they can
        cost_EW = factor_EWW.diagonal(dim1=-2, dim2=-1) ** -2
        code, negative, level_ENW = _nearest(codec, left_ENS[..., own], scale_ENS[..., own], cost_EW)
        codes.append(code)
        negatives.append(negative)
        error_ENW = torch.linalg.solve_triangular(
            factor_EWW, left_ENS[..., own] - scale_ENS[..., own] * level_ENW, upper=True, left=False
        )
        left_ENS[..., first + step :] -= error_ENW @ factor_ESS[:, own, first + step :]
    codes_RC = torch.cat(codes, -1).reshape(len(blocks_RB), -1).numpy()
    negative_RS = None if codec.sign_bits is None else torch.cat(negatives, -1).reshape(len(blocks_RB), -1).numpy()
    blocks_RB = codec.put(blocks_RB, codes_RC, negative_RS)
    blocks_RB = _refit(codec, blocks_RB, weight_ENS, offset_ENS, factor_ESS)
    decoded_ENS = torch.from_numpy(ggml.decode(blocks_RB, codec.quant_type, shape[-1])).reshape(shape)
    return blocks_RB, torch.linalg.solve_triangular(factor_ESS, weight_ENS - decoded_ENS, upper=True, left=False)


def _nearest(
    codec: Codec, target_ENW: torch.Tensor, scale_ENW: torch.Tensor, cost_EW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes and signs whose levels, scaled, are nearest: i64 (E, N, W / width), bool (E, N, W), levels f32."""
    codebook_GW = torch.from_numpy(codec.codebook_GW)
    if codec.sign_bits is None:
        code = _nearest_code(codebook_GW, target_ENW, scale_ENW, cost_EW)
        return code[..., None], torch.zeros_like(target_ENW, dtype=torch.bool), codebook_GW[code]
    negative_ENW = (target_ENW < 0) != (scale_ENW < 0)
    if codec.has_even_signs:
        cheapest = (target_ENW.square() * cost_EW[:, None]).argmin(-1, keepdim=True)
        odd = negative_ENW.sum(-1, keepdim=True) % 2 == 1
        negative_ENW = negative_ENW.scatter(-1, cheapest, negative_ENW.gather(-1, cheapest) ^ odd)
    upright_ENW = torch.where(negative_ENW, -target_ENW, target_ENW)
    parts = [
        _nearest_code(codebook_GW, *(x[..., i : i + codec.width] for x in (upright_ENW, scale_ENW, cost_EW)))
        for i in range(0, target_ENW.shape[-1], codec.width)
    ]
    level_ENW = torch.cat([codebook_GW[code] for code in parts], -1)
    return torch.stack(parts, -1), negative_ENW, torch.where(negative_ENW, -level_ENW, level_ENW)


def _nearest_code(
    codebook_GW: torch.Tensor, target_ENW: torch.Tensor, scale_ENW: torch.Tensor, cost_EW: torch.Tensor
) -> torch.Tensor:
    """argmin over g of sum_w cost * (target - scale * codebook[g])², i64 (E, N). One code has one scale."""
    scale_EN = scale_ENW[..., 0]
    if codebook_GW.shape[1] == 1:
        levels, order = codebook_GW[:, 0].sort()
        # a zero scale decodes to zero whatever the code
        quotient_EN = torch.where(scale_EN != 0, target_ENW[..., 0] / scale_EN, 0.0)
        return order[torch.bucketize(quotient_EN, (levels[1:] + levels[:-1]) / 2)]
    square_EG = cost_EW @ codebook_GW.square().T
    weighted_ENW = -2 * target_ENW * cost_EW[:, None]
    n_experts, n_rows = scale_EN.shape
    code_EN = torch.empty((n_experts, n_rows), dtype=torch.int64)
    chunk = max(1, CHUNK_DISTANCES // len(codebook_GW))
    for e in range(n_experts):
        for rows in torch.arange(n_rows).split(chunk):
            distance_NG = torch.addmm(scale_EN[e, rows, None] * square_EG[e], weighted_ENW[e, rows], codebook_GW.T)
            code_EN[e, rows] = (distance_NG * scale_EN[e, rows, None].sign()).argmin(-1)
    return code_EN


def _refit(
    codec: Codec, blocks_RB: np.ndarray, weight_ENS: torch.Tensor, offset_ENS: torch.Tensor, factor_ESS: torch.Tensor
) -> np.ndarray:
    """The block's scale by least squares, in what an error costs after the columns behind the block undo it."""
    if codec.scale_bits is None:
        return blocks_RB
    decoded_ENS = torch.from_numpy(ggml.decode(blocks_RB, codec.quant_type, codec.block_weights))
    scaled_ENS = decoded_ENS.reshape(weight_ENS.shape) - offset_ENS
    wanted, found = (
        torch.linalg.solve_triangular(factor_ESS, x, upper=True, left=False)
        for x in (weight_ENS - offset_ENS, scaled_ENS)
    )
    ratio_R = ((wanted * found).sum(-1) / found.square().sum(-1).clamp_min(1e-30)).reshape(-1).numpy()
    old_R = codec.block_scale(blocks_RB).astype(np.float32)
    new_R = (old_R * ratio_R).astype(np.float16)
    keep_R = ~np.isfinite(new_R) | (ratio_R < 0.5) | (ratio_R > 2)  # noise of a block that is all but zero
    return codec.put_block_scale(blocks_RB, np.where(keep_R, old_R.astype(np.float16), new_R))
