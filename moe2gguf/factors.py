"""Triangular roots of Hessians: what an error costs, and what the columns after it can make up for.

Shapes: E experts, K columns.
"""

import torch

# columns that are taken together where they meet all others
PANEL = 256


def inverse_factor(hessian_EKK: torch.Tensor) -> torch.Tensor:
    """U upper triangular with UᵀU = H⁻¹, f32 (E, K, K), of few columns: R⁻¹ of the root."""
    return inverse(root(hessian_EKK))


def inverse(upper_XKK: torch.Tensor) -> torch.Tensor:
    one_KK = torch.eye(upper_XKK.shape[-1], device=upper_XKK.device)
    return torch.linalg.solve_triangular(upper_XKK, one_KK, upper=True)


def root(hessian_EKK: torch.Tensor, into_EKK: torch.Tensor | None = None) -> torch.Tensor:
    """R upper triangular with R Rᵀ = H, f32 (E, K, K); in f64 where rounding to f32 leaves H indefinite."""
    root_EKK = torch.empty_like(hessian_EKK) if into_EKK is None else into_EKK
    try:
        _into_root(root_EKK.copy_(hessian_EKK))
    except torch.linalg.LinAlgError:
        _into_root(double_EKK := hessian_EKK.double())
        root_EKK.copy_(double_EKK)
    return root_EKK.triu_()


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
