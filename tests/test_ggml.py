import sys
import time
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from moe2gguf import ggml
from moe2gguf.costs import CANDIDATES, UNMEASURED_TYPES
from moe2gguf.errors import RuntimeMissing
from moe2gguf.ggml import QuantType

K = 512  # two blocks of 256
F16_MAX = 65504
# everything a file can hold: candidates, what is kept without a measurement, the base files of an evaluation
TYPES = (*CANDIDATES, *UNMEASURED_TYPES[1:], QuantType.F16, QuantType.F32)
EXACT_TYPES = (QuantType.BF16, QuantType.F16, QuantType.F32)
each_type = pytest.mark.parametrize("quant_type", TYPES, ids=lambda t: t.name)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def importance(seed: int = 1) -> np.ndarray:
    return np.square(gaussian(K, seed=seed)) + 1e-3


def relative_error(weight_RK: np.ndarray, other_RK: np.ndarray) -> float:
    return float(np.sqrt(np.square(weight_RK - other_RK).mean() / np.square(weight_RK).mean()))


@each_type
def test_decoder_is_ggufs(quant_type):
    blocks_RB = ggml.encode(gaussian(5, K), quant_type, importance())
    assert blocks_RB.dtype == np.uint8 and blocks_RB.shape == (5, ggml.row_bytes(quant_type, K))
    decoded_RK = ggml.decode(blocks_RB, quant_type, K)
    reference_RK = gguf.dequantize(blocks_RB, quant_type)
    # both multiply a scale with an integer, in another order for some types: one rounding of f32 apart
    np.testing.assert_allclose(decoded_RK, reference_RK, rtol=3e-7, atol=1e-7)
    assert decoded_RK.dtype == np.float32 and decoded_RK.shape == (5, K)


@each_type
def test_decoding_any_bytes_is_ggufs(quant_type):
    """Random blocks reach the codes and scales that an encoder never writes."""
    blocks_RB = np.random.default_rng(3).integers(0, 256, (8, ggml.row_bytes(quant_type, K)), np.uint8)
    with np.errstate(all="ignore"):
        reference_RK = gguf.dequantize(blocks_RB, quant_type)
        decoded_RK = ggml.decode(blocks_RB, quant_type, K)
    finite = np.isfinite(reference_RK)
    assert finite.sum() > 0.5 * finite.size
    largest = np.abs(reference_RK[finite]).max()
    np.testing.assert_allclose(decoded_RK[finite], reference_RK[finite], rtol=1e-5, atol=1e-6 * largest)
    assert not np.isfinite(decoded_RK[~finite]).any()


def test_row_bytes_are_blocks():
    assert ggml.row_bytes(QuantType.IQ2_XXS, 512) == 2 * 66  # f16 scale and 64 bytes of codes
    assert ggml.row_bytes(QuantType.Q8_0, 64) == 2 * 34
    assert ggml.row_bytes(QuantType.BF16, 7) == 14
    assert ggml.bits_per_weight(QuantType.Q4_K) == 4.5
    assert ggml.fits(QuantType.Q8_0, 96) and not ggml.fits(QuantType.Q4_K, 96)
    with pytest.raises(AssertionError):
        ggml.row_bytes(QuantType.Q4_K, 96)


def test_more_bits_decode_closer():
    """The error falls with the bits, but for neighbours made for different uses (Q2_K and Q3_K are older)."""
    weight_RK = gaussian(64, K)
    error = {t: relative_error(weight_RK, ggml.round_trip(weight_RK, t)) for t in TYPES}
    for worse, better in (("IQ1_M", "IQ2_XXS"), ("IQ2_XXS", "IQ2_S"), ("IQ2_S", "IQ3_XXS"), ("IQ3_XXS", "IQ4_XS")):
        assert error[QuantType[worse]] > 1.1 * error[QuantType[better]]
    for worse, better in (("IQ4_NL", "Q5_0"), ("Q4_K", "Q5_K"), ("Q5_K", "Q6_K"), ("Q6_K", "Q8_0"), ("Q8_0", "F16")):
        assert error[QuantType[worse]] > 1.5 * error[QuantType[better]]
    assert error[QuantType.F32] == 0


@pytest.mark.parametrize("quant_type", CANDIDATES, ids=lambda t: t.name)
def test_importance_moves_the_error(quant_type):
    """Columns that count are decoded better than by an encoder that was told all count alike."""
    weight_RK, importance_K = gaussian(64, K), np.ones(K, np.float32)
    importance_K[::4] = 100.0
    told = ggml.round_trip(weight_RK, quant_type, importance_K) - weight_RK
    untold = ggml.round_trip(weight_RK, quant_type) - weight_RK
    if quant_type in (QuantType.Q8_0,):
        assert np.array_equal(told, untold)  # its scale is the largest weight's; ggml takes no importance there
        return
    assert (importance_K * np.square(told)).sum() < 0.999 * (importance_K * np.square(untold)).sum()


def outlier() -> np.ndarray:
    weight_K = 0.02 * gaussian(K)
    weight_K[300] = 500.0
    return weight_K


EDGE_ROWS = {
    "all zero: a scale of 0 must not divide": np.zeros(K),
    "one outlier: everything beside it rounds to 0": outlier(),
    "constant: no spread": np.full(K, 0.37),
    "constant and negative": np.full(K, -0.37),
    "one sign: no mean of 0": np.abs(gaussian(K)) + 1,
    "largest f16": np.where(np.arange(K) % 3, 1.0, -1.0) * F16_MAX,
    "denormal in f32": gaussian(K) * 1e-41,
    "denormal in f16: the scale rounds to 0": gaussian(K) * 1e-9,
    "smallest f16 scale": gaussian(K) * 1e-6,
    "one block of zeros beside one of weights": np.r_[np.zeros(256), gaussian(256)],
    "alternating signs": np.where(np.arange(K) % 2, 0.5, -0.5),
}


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("edge", EDGE_ROWS)
def test_edge_rows_decode_finite(edge, quant_type):
    weight_RK = EDGE_ROWS[edge].astype(np.float32)[None]
    decoded_RK = ggml.round_trip(weight_RK, quant_type, importance())
    assert np.isfinite(decoded_RK).all()
    largest = float(np.abs(weight_RK).max())
    # no decoded weight leaps beyond the row; IQ1_M, with 3 levels at sub-scales of 3 bits, misses constants by 63 %
    assert np.abs(decoded_RK).max() <= 1.7 * largest + 1e-7
    if edge.startswith("all zero"):
        assert not decoded_RK.any()
    if edge.startswith("one block of zeros"):
        assert not decoded_RK[:, :256].any()


@pytest.mark.parametrize("quant_type", CANDIDATES, ids=lambda t: t.name)
def test_no_importance_at_all(quant_type):
    """Dead inputs: an importance of 0 everywhere must not divide, nor one with a single column that counts."""
    weight_RK = gaussian(4, K)
    single_K = np.zeros(K, np.float32)
    single_K[17] = 1
    for importance_K in (np.zeros(K, np.float32), single_K, np.full(K, 1e-30, np.float32)):
        decoded_RK = ggml.round_trip(weight_RK, quant_type, importance_K)
        assert np.isfinite(decoded_RK).all()
        assert np.abs(decoded_RK).max() <= 1.6 * np.abs(weight_RK).max()


@pytest.mark.parametrize("quant_type", CANDIDATES, ids=lambda t: t.name)
def test_beyond_f16_is_no_quiet_success(quant_type):
    """Scales are f16. What they cannot hold must show as inf or NaN in the decoded weights, as calibration relies on
    (it then rules the type out for the matrix), or decode well."""
    weight_RK = gaussian(2, K) * 1e9
    with np.errstate(all="ignore"):
        decoded_RK = ggml.round_trip(weight_RK, quant_type)
        assert not np.isfinite(decoded_RK).all() or relative_error(weight_RK, decoded_RK) < 1


@each_type
def test_slices_and_threads_make_the_same_bytes(quant_type):
    weight_RK, importance_K = gaussian(37, K), importance()
    whole_RB = ggml.encode(weight_RK, quant_type, importance_K)
    slices = [weight_RK[start : start + 5] for start in range(0, 37, 5)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(ggml.encode, part, quant_type, importance_K) for part in slices]
        assert np.array_equal(np.concatenate([job.result() for job in jobs]), whole_RB)
    whole_RK = ggml.decode(whole_RB, quant_type, K)
    parts_RK = [ggml.decode(whole_RB[start : start + 5], quant_type, K) for start in range(0, 37, 5)]
    assert np.array_equal(np.concatenate(parts_RK), whole_RK)


@each_type
def test_strided_views_are_taken_as_they_look(quant_type):
    """A transposed or sliced view is not contiguous; ggml reads memory in a row."""
    weight_RK = gaussian(6, K)
    view_RK = np.asfortranarray(weight_RK)
    blocks_RB = ggml.encode(weight_RK, quant_type)
    assert np.array_equal(ggml.encode(view_RK, quant_type), blocks_RB)
    assert np.array_equal(
        ggml.decode(np.repeat(blocks_RB, 2, axis=0)[::2], quant_type, K), ggml.decode(blocks_RB, quant_type, K)
    )


def test_exact_types_are_exact():
    weight_RK = gaussian(4, K)
    halves_RK = weight_RK.astype(np.float16).astype(np.float32)
    assert np.array_equal(ggml.round_trip(halves_RK, QuantType.F16), halves_RK)
    assert np.array_equal(ggml.round_trip(weight_RK, QuantType.F32), weight_RK)
    cut_RK = (weight_RK.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert np.array_equal(ggml.round_trip(cut_RK, QuantType.BF16), cut_RK)


@pytest.mark.parametrize("quant_type", CANDIDATES, ids=lambda t: t.name)
def test_no_importance_means_all_alike(quant_type):
    weight_RK = gaussian(3, K)
    ones_K = np.ones(K, np.float32)
    assert np.array_equal(ggml.encode(weight_RK, quant_type), ggml.encode(weight_RK, quant_type, ones_K))


def test_importance_of_another_width_is_our_bug():
    with pytest.raises(AssertionError):
        ggml.encode(gaussian(2, K), QuantType.Q4_K, np.ones(K - 1, np.float32))


def test_missing_library_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    ggml._library.cache_clear()
    try:
        with pytest.raises(RuntimeMissing, match="moe2gguf runtime install"):
            ggml.encode(gaussian(1, K), QuantType.Q4_K)
    finally:
        ggml._library.cache_clear()


def test_missing_package_says_what_to_run(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as the import system marks what is not there
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RuntimeMissing, match="moe2gguf runtime install"):
        ggml.library_folder()


def test_a_failure_drops_the_queue():
    """Ctrl-C among a thousand queued jobs waits for those that run, not for the rest."""
    started: list[int] = []

    def job(number: int) -> None:
        started.append(number)
        time.sleep(0.05)

    def interrupted() -> None:
        with ggml.encoding_threads(2) as pool:
            for number in range(1000):
                pool.submit(job, number)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(started) < 100
    with ggml.encoding_threads(2) as pool:
        assert [f.result() for f in [pool.submit(int, i) for i in range(9)]] == list(range(9))
