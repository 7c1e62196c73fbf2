import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from moe2gguf.errors import Moe2ggufError, RuntimeMissing
from moe2gguf.evaluate import _compare, _log_softmax, _summarise, evaluate, held_out_text, render_evaluations
from moe2gguf.llama_tools import divergence, run_base
from moe2gguf.runtime import find_runtime

# llama-perplexity stores base log-probabilities as 16-bit steps of a range of at most 16 nats: half a step is
# the largest rounding of one of them, and of a prediction's KL divergence, which is a weighted mean of them
HALF_STEP_NATS = 16 / 65535 / 2
# 4 sequences in one batch there, 1 here: float sums in another order
BATCHING_NATS = 2e-5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The demo model as BF16 and as Q4_0, and 6 chunks and a bit of text."""
    try:
        find_runtime()
    except RuntimeMissing as error:
        pytest.skip(str(error))
    from moe2gguf.pipeline import write_float

    folder = tmp_path_factory.mktemp("evaluate")
    base = write_float("demo", folder / "base.gguf", ftype="bf16")
    candidate = write_float("demo", folder / "candidate.gguf", ftype="q4_0")
    text = held_out_text(12_000)
    (folder / "text.txt").write_text(text + "\n", encoding="utf-8")  # the tool takes one newline off the end
    return base, candidate, text, folder / "text.txt"


def test_statistics_match_a_plain_computation():
    rng = np.random.default_rng(0)
    base_TV, other_TV = rng.standard_normal((2, 70, 50), np.float32) * 4
    targets_T = rng.integers(0, 50, 70)
    scores = _compare(_log_softmax(base_TV), _log_softmax(other_TV), targets_T)
    base, other = (log_softmax(x.astype(np.float64), axis=1) for x in (base_TV, other_TV))
    kld_T = rel_entr(np.exp(base), np.exp(other)).sum(axis=1)
    nll_T, base_nll_T = (-x[np.arange(70), targets_T] for x in (other, base))
    # one f32 log-probability is good to about 1e-6
    np.testing.assert_allclose(scores.kld_T, kld_T, rtol=1e-5)
    np.testing.assert_allclose(scores.nll_T, nll_T, rtol=1e-5)
    summary = _summarise(SimpleNamespace(path=None, n_ctx=140, skipped_share=None), 1, base_nll_T, [scores])
    assert summary.perplexity == pytest.approx(np.exp(nll_T.mean()), rel=1e-5)
    assert summary.delta_nll == pytest.approx((nll_T - base_nll_T).mean(), abs=1e-5)
    assert summary.delta_nll_error == pytest.approx(np.std(nll_T - base_nll_T, ddof=1) / 70**0.5, rel=1e-5)
    assert summary.kld_error == pytest.approx(np.std(kld_T, ddof=1) / 70**0.5, rel=1e-5)
    assert summary.kld_max == pytest.approx(kld_T.max(), rel=1e-5)
    assert summary.same_top == np.mean(base.argmax(1) == other.argmax(1))


def test_log_softmax_of_extreme_logits():
    logits_TV = np.array([[3e4, 0, -3e4], [-3e4, -3e4, -3e4]], np.float32)  # exp would overflow, or all underflow
    np.testing.assert_allclose(_log_softmax(logits_TV), [[0, -3e4, -6e4], [-np.log(3)] * 3], rtol=1e-6)


def test_a_file_against_itself(files):
    base, _, text, _ = files
    seen = []
    (e,) = evaluate(base, [base], text, max_chunks=2, progress=lambda done, n, name: seen.append((done, n)))
    assert (e.kld_max, e.delta_nll, e.same_top) == (0, 0, 1)
    assert e.perplexity == e.base_perplexity
    assert (e.n_chunks, e.n_tokens) == (2, 2 * 255)
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_candidates_do_not_depend_on_each_other_or_on_threads(files):
    base, candidate, text, _ = files
    alone = evaluate(base, [candidate], text, max_chunks=2, n_threads=1)
    among = evaluate(base, [base, candidate, candidate], text, max_chunks=2, n_threads=3)
    assert among[1] == among[2] == alone[0]
    assert alone[0].kld_mean > 0 and "candidate.gguf" in {e.path.name for e in alone}
    assert render_evaluations(among).row_count == 3


def test_agrees_with_llama_perplexity(files, tmp_path):
    base, candidate, text, text_file = files
    logits = tmp_path / "base.kld"
    base_run = run_base(base, text_file, logits, n_ctx=512, max_chunks=100, n_threads=1)
    theirs = divergence(candidate, logits, base_run, n_ctx=512, n_threads=1, folder=tmp_path)
    (e,) = evaluate(base, [candidate], text)
    assert (base_run.n_chunks, base_run.n_tokens) == (e.n_chunks, e.n_tokens)
    assert e.n_chunks >= 6
    step, one_flip = HALF_STEP_NATS + BATCHING_NATS, 1 / e.n_tokens
    # these come from unrounded logits, and are printed with 4 and 6 decimals
    assert base_run.perplexity == pytest.approx(e.base_perplexity, rel=2e-5)
    assert base_run.perplexity_error == pytest.approx(e.base_perplexity_error, rel=1e-4)
    assert theirs.perplexity == pytest.approx(e.perplexity, rel=BATCHING_NATS)
    assert theirs.perplexity_error == pytest.approx(e.perplexity_error, rel=1e-4)
    assert e.delta_nll == pytest.approx(np.log(e.perplexity / e.base_perplexity), abs=1e-9)
    assert theirs.delta_nll == pytest.approx(e.delta_nll, abs=2 * BATCHING_NATS)
    # of the base's rounded log-probabilities
    assert theirs.delta_nll_error == pytest.approx(e.delta_nll_error, rel=0.01)
    # rounding is as often up as down, so the mean over many predictions is much closer
    assert theirs.kld_mean == pytest.approx(e.kld_mean, abs=BATCHING_NATS)
    assert theirs.kld_error == pytest.approx(e.kld_error, abs=BATCHING_NATS)
    assert theirs.kld_99 == pytest.approx(e.kld_99, abs=step)
    assert theirs.kld_max == pytest.approx(e.kld_max, abs=step)
    # a tie within the rounding may fall the other way
    assert theirs.same_top == pytest.approx(e.same_top, abs=2 * one_flip)
    assert theirs.skipped == 0


def test_what_cannot_be_evaluated(files, tmp_path):
    base, candidate, text, _ = files
    with pytest.raises(Moe2ggufError, match="one chunk needs 512"):
        evaluate(base, [candidate], "short")
    with pytest.raises(Moe2ggufError, match="is not there"):
        evaluate(base, [tmp_path / "absent.gguf"], text)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(candidate.read_bytes()[:5000])
    with pytest.raises(Moe2ggufError, match=f"cannot load {cut}: .*failed to read"):
        evaluate(base, [cut], text)


def test_held_out_text():
    text = held_out_text(100_000)
    assert text == held_out_text(100_000)
    assert 99_000 < len(text.encode()) <= 100_000
    # a shorter one is its beginning, so that max_chunks and max_bytes cut alike
    assert text.startswith(held_out_text(30_000))
    # both halves: the reference manual's prose and real code
    assert 'The "assert" statement' in text and "import " in text and "def " in text


def test_an_evaluation_is_a_record(files):
    base, _, text, _ = files
    (e,) = evaluate(base, [base], text, max_chunks=1)
    assert dataclasses.is_dataclass(e) and all(v == v for v in dataclasses.astuple(e))  # no NaN
