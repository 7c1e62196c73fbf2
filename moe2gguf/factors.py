"""Triangular factors of inverse Hessians: what an error costs, and what the columns after it can make up for.

Shapes: E experts, K columns.
"""

import torch

# columns that are factored, and substituted, at a time
PANEL = 256


def inverse_factor(hessian_EKK: torch.Tensor) -> torch.Tensor:
    """U upper triangular with UᵀU = H⁻¹, f32 (E, K, K): R⁻¹ of the root."""
    factor_EKK = root(hessian_EKK)
    _into_inverse(factor_EKK)
    return factor_EKK


def root(hessian_EKK: torch.Tensor) -> torch.Tensor:
    """R upper triangular with R Rᵀ = H, f32 (E, K, K); in f64 where rounding to f32 leaves H indefinite."""
    root_EKK = hessian_EKK.clone()
    try:
        _into_root(root_EKK)
    except torch.linalg.LinAlgError:
        _into_root(root_EKK := hessian_EKK.double())
    return root_EKK.triu_().float()


def _into_root(hessian_EKK: torch.Tensor) -> None:
    """By panels from the last, in products, which take a fraction of LAPACK's time; below the diagonal H stays."""
    n_columns = hessian_EKK.shape[-1]
    for stop in range(n_columns, 0, -PANEL):
        start = max(0, stop - PANEL)
        left_EKP = hessian_EKK[:, :stop, start:stop]
        if stop < n_columns:
            left_EKP -= hessian_EKK[:, :stop, stop:] @ hessian_EKK[:, start:stop, stop:].mT
        corner_EPP = torch.linalg.cholesky(left_EKP[:, start:].flip(1, 2)).flip(1, 2)
        left_EKP[:, start:] = corner_EPP
        if start:
            above_EKP = left_EKP[:, :start]
            above_EKP.copy_(torch.linalg.solve_triangular(corner_EPP.mT, above_EKP, upper=False, left=False))


def _into_inverse(upper_EKK: torch.Tensor) -> None:
    """By halves, whose products take less time than substitution."""
    n_columns = upper_EKK.shape[-1]
    if n_columns <= PANEL:
        one_KK = torch.eye(n_columns, device=upper_EKK.device)
        upper_EKK.copy_(torch.linalg.solve_triangular(upper_EKK, one_KK, upper=True))
        return
    first, second = slice(n_columns // 2), slice(n_columns // 2, n_columns)
    for own in (first, second):
        _into_inverse(upper_EKK[:, own, own])
    beside_EKK = upper_EKK[:, first, first] @ upper_EKK[:, first, second]
    upper_EKK[:, first, second] = -(beside_EKK @ upper_EKK[:, second, second])
