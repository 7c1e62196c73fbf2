"""What llama.cpp's programs print, as numbers. That they agree with our own evaluation is tests/test_evaluate.py."""

import math
from pathlib import Path

import pytest

from moe2gguf.errors import Moe2ggufError
from moe2gguf.llama_tools import BaseRun, divergence, parse_divergence, run_base, speed

BASE = BaseRun(20.0, 0.5, 2, 510)
OUTPUT = """
chunk        PPL              ln(PPL(Q)/PPL(base))          KL Divergence          Δp RMS            Same top p
====== Perplexity statistics ======
Mean PPL(Q)                   :  24.154788 ±   1.066492
Mean PPL(base)                :  23.544433 ±   1.044448
Mean ln(PPL(Q)/PPL(base))     :   0.025594 ±   0.004585
Mean PPL(Q)-PPL(base)         :   0.610355 ±   0.111568

====== KL divergence statistics ======
Mean    KLD:   0.034762 ±   0.000975
Maximum KLD:   2.594393
99.9%   KLD:   1.023135
99.0%   KLD:   0.223135

Same top p: 87.304 ± 0.521 %
0.01 I llama_perf_context_print: layer   0 experts =        750 computed,        250 skipped ( 25.0 %)
0.01 I llama_perf_context_print: layer   1 experts =       1500 computed,        500 skipped ( 25.0 %)
0.01 I llama_perf_context_print: layer   2 experts =        900 computed,        100 skipped ( 10.0 %)
"""


def test_numbers_are_taken_from_their_lines() -> None:
    found = parse_divergence(OUTPUT, BASE)
    assert (found.perplexity, found.perplexity_error) == (24.154788, 1.066492)  # not that of PPL(Q)-PPL(base)
    assert found.delta_nll == pytest.approx(math.log(24.154788 / 20))
    assert found.delta_nll_error == 0.004585
    assert (found.kld_mean, found.kld_error, found.kld_99, found.kld_max) == (0.034762, 0.000975, 0.223135, 2.594393)
    assert (found.same_top, found.same_top_error) == pytest.approx((0.87304, 0.00521))  # not the heading's
    assert found.skipped == pytest.approx(0.2)  # the mean of the layers


def test_a_file_against_itself_has_no_error() -> None:
    assert parse_divergence(OUTPUT.replace("0.025594 ±   0.004585", "0.000000 ±       -nan"), BASE).delta_nll_error == 0


def test_other_output_is_refused() -> None:
    with pytest.raises(Moe2ggufError, match="printed no number after 'Mean    KLD'"):
        parse_divergence(OUTPUT.replace("Mean    KLD", "Average KLD"), BASE)
    assert parse_divergence(OUTPUT.replace("experts =", "no experts"), BASE).skipped is None


def test_a_file_has_a_divergence_and_a_speed(converted, small_text: Path, tmp_path: Path) -> None:
    result = converted("qwen3_moe").results["grouped"]
    logits = tmp_path / "base.kld"
    base = run_base(result.path, small_text, logits, n_ctx=32, max_chunks=7, n_threads=1)
    assert (base.n_chunks, base.n_tokens) == (7, 7 * 15)
    with pytest.raises(Moe2ggufError, match="are 90 predictions, and llama-perplexity makes no statistics of fewer"):
        run_base(result.path, small_text, logits, n_ctx=32, max_chunks=6, n_threads=1)
    base = run_base(result.path, small_text, logits, n_ctx=32, max_chunks=7, n_threads=1)  # the file is there again
    itself = divergence(result.path, logits, base, n_ctx=32, n_threads=1, folder=tmp_path)
    assert itself.kld_mean < 1e-4 and itself.same_top == 1 and abs(itself.delta_nll) < 1e-5
    found = speed(result.path, n_threads=1, folder=tmp_path)
    assert found.prompt > 0 and found.decode > 0
    with pytest.raises(Moe2ggufError, match="llama-perplexity failed with exit status"):
        divergence(tmp_path / "absent.gguf", logits, base, n_ctx=32, n_threads=1, folder=tmp_path)
