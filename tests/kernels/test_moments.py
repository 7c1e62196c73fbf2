"""Moments against the plain sums, and those against f64."""

from itertools import pairwise

import pytest
import torch

from moe2gguf.moments import moments as plain_moments
from moe2gguf_kernels.moments import moments

# an expert no token reached, first, in the middle and last; one token; more than a tile of slots, no multiple of it
COUNTS = (0, 1, 45, 0, 32, 0)


def routed(n_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens by expert i32 (n,), offsets i64 (E + 1,), weights f32 (n,), of which some are negative."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randperm(n_tokens, generator=generator)[:count] for count in COUNTS]
    offset_E1 = torch.tensor([0, *COUNTS]).cumsum(0)
    return torch.cat(tokens).int(), offset_E1, torch.randn(sum(COUNTS), generator=generator)


def assert_near(found_EMK: torch.Tensor, x_TK, token_n, offset_E1, weight_n, other_SM, slot_n) -> None:
    """Within 1e-5 of the sum of the terms' magnitudes."""
    for e, (begin, end) in enumerate(pairwise(offset_E1)):
        x_nK = x_TK[token_n[begin:end].long()].double()
        weighed_nM = other_SM[slot_n[begin:end].long()].double() * weight_n[begin:end, None]
        bound_MK = 1e-5 * weighed_nM.abs().T @ x_nK.abs()
        assert ((found_EMK[e].cpu() - weighed_nM.T @ x_nK).abs() <= bound_MK).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_columns", [24, 200])  # less than a tile; two, the second cut
@pytest.mark.parametrize("function", [plain_moments, moments], ids=["plain", "kernel"])
def test_second_moments(function, n_columns: int, dtype: torch.dtype, device: torch.device) -> None:
    x_TK = torch.randn(50, n_columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    routes = routed(50)
    found_EKK = function(x_TK.to(device), *(x.to(device) for x in routes))
    assert found_EKK.dtype == torch.float32
    assert_near(found_EKK, x_TK, *routes, x_TK, routes[0])
    if function is moments:
        assert torch.equal(found_EKK, found_EKK.mT)


@pytest.mark.parametrize("function", [plain_moments, moments], ids=["plain", "kernel"])
def test_cross_moments_are_added(function, device: torch.device) -> None:
    """The other side has a row for each slot, in the order of tokens rather than of experts."""
    generator = torch.Generator().manual_seed(2)
    x_TK, routes = torch.randn(50, 20, generator=generator), routed(50)
    other_SM = torch.randn(sum(COUNTS), 140, generator=generator)
    slot_n = torch.randperm(sum(COUNTS), generator=generator)
    before_EMK = torch.randn(len(COUNTS), 140, 20, generator=generator)
    total_EMK = before_EMK.clone().to(device)
    arguments = (x_TK, *routes, other_SM, slot_n)
    assert function(*(x.to(device) for x in arguments), total_EMK) is total_EMK
    assert torch.equal(total_EMK[0].cpu(), before_EMK[0])
    alone_EMK = function(*(x.to(device) for x in arguments))
    assert_near(alone_EMK, *arguments)
    torch.testing.assert_close(total_EMK, alone_EMK + before_EMK.to(device))


def test_second_moments_are_added(device: torch.device) -> None:
    """Both a tile and its mirror image."""
    x_TK, routes = torch.randn(50, 150, generator=torch.Generator().manual_seed(3)), routed(50)
    arguments = [x.to(device) for x in (x_TK, *routes)]
    once_EKK = moments(*arguments)
    twice_EKK = moments(*arguments, total_EMK=once_EKK.clone())
    assert torch.equal(twice_EKK, 2 * once_EKK)
