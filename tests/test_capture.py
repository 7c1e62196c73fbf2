"""Samples of tokens."""

import pytest
import torch

from moe2gguf.capture import spread_tokens


@pytest.mark.parametrize("n_tokens", [0, 1, 5, 64, 100, 65536])
def test_a_sample_is_spread(n_tokens: int) -> None:
    """One of each run, ascending; of few tokens all."""
    found_n = spread_tokens(n_tokens, 64)
    n = min(n_tokens, 64)
    assert len(found_n) == n
    assert all(i * n_tokens // n <= token < (i + 1) * n_tokens // n for i, token in enumerate(found_n.tolist()))


@pytest.mark.parametrize("n_wanted", [64, 512, 8192])
def test_a_sample_is_of_all_places_in_sequences(n_wanted: int) -> None:
    """Of 128 sequences of 512 tokens, whose first ones even steps would find 64 times."""
    place_n = spread_tokens(128 * 512, n_wanted) % 512
    assert (place_n == 0).float().mean() < 4 / 512 + 1 / n_wanted
    share = torch.histc(place_n.float(), 8, 0, 512) / n_wanted
    assert share.min() > 0.06 and share.max() < 0.2
