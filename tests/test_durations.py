"""Of a Qwen3-MoE of 2 layers: hidden 256, 6 experts of 256, top-2, a vocabulary of 320; rates are made up."""

import dataclasses
from pathlib import Path

import pytest
import torch

from moe2gguf import durations
from moe2gguf.costs import cost_table
from moe2gguf.durations import (
    FACTORED_COLUMNS,
    Rates,
    calibration_seconds,
    measured_rates,
    quantise_seconds,
    writing_seconds,
)
from moe2gguf.settings import Calibration, Quantizer
from moe2gguf.source import Source, open_source

NEVER = 1e30
NOTHING = Rates(
    matmul_flops=NEVER,
    layer_flops=NEVER,
    writer_flops=NEVER,
    encoded_weights=NEVER,
    probed_weights=NEVER,
    decoded_weights=NEVER,
    fed_back_weights=NEVER,
    factor_seconds=0.0,
    draw_seconds=0.0,
)
PRODUCTS = {"matmul_flops": 1.0, "layer_flops": 1.0}
CALIBRATION = Calibration((Path("text"),), n_sequences=16, sequence_tokens=64, sensitivity="probe")
LENGTH, N_TOKENS = 64, 16 * 64
EXPERT_PARAMS = 2 * 6 * 3 * 256 * 256


@pytest.fixture
def source(tiny) -> Source:
    return open_source(tiny("qwen3_moe"))


def quantising(
    source: Source,
    quantizer: Quantizer = Quantizer(),  # noqa: B008 (frozen)
    calibration: Calibration = CALIBRATION,
    n_threads: int = 1,
    **rates: float,
) -> float:
    return quantise_seconds(source, calibration, LENGTH, quantizer, dataclasses.replace(NOTHING, **rates), n_threads)


def calibrating(source: Source, calibration: Calibration = CALIBRATION, *, pruned: bool = False, **rates: float):
    table = cost_table(source, None, layout="grouped")
    used = dataclasses.replace(NOTHING, **rates)
    return calibration_seconds(source, table, calibration, LENGTH, used, pruned=pruned)


def one_pass(source: Source) -> float:
    """Multiplications and additions of the text through the layers: all matrices but experts, two of six experts, and
    attention, where all heads' values are as wide as what the output projection takes."""
    flops = 0
    for tensor in source.tensors:
        if tensor.name.startswith("blk."):
            n_params = 1
            for n in tensor.shape:
                n_params *= n
            flops += 2 * N_TOKENS * n_params * (2 / 6 if "_exps" in tensor.name else 1)
            if "attn_output" in tensor.name:
                flops += 2 * 2 * N_TOKENS * LENGTH * tensor.shape[1]
    return flops


def test_codes_and_factors(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = [t for t in source.tensors if t.quantisable and "_exps" not in t.name and t.name != "token_embd.weight"]
    assert {t.name.split(".")[-2] for t in beside} == {"attn_q", "attn_k", "attn_v", "attn_output", "output"}
    n_beside = sum(t.shape[0] * t.shape[1] for t in beside)
    n_sampled = sum(32 * t.shape[1] for t in beside)
    # 32 of 256 rows with each of three dampings before all of them with one
    assert quantising(source, fed_back_weights=1.0) == pytest.approx(
        EXPERT_PARAMS * (1 + 3 * 32 / 256) + n_beside + 3 * n_sampled
    )
    # the same rows by ggml, and twice or thrice all that is neither
    others = source.n_params - EXPERT_PARAMS - n_beside
    by_ggml = EXPERT_PARAMS / 8 + n_sampled
    assert quantising(source, encoded_weights=1.0) == pytest.approx(by_ggml + 3 * others)
    assert quantising(source, Quantizer(router="none"), encoded_weights=1.0) == pytest.approx(by_ggml + 2 * others)
    assert quantising(source, Quantizer(feedback=False), encoded_weights=1.0) == source.n_params
    # of each expert in each layer what gate and up are given, and what down is, with four dampings; of the others each
    assert quantising(source, factor_seconds=1.0) == pytest.approx(
        4 * (2 * 6 * 2 * 256**3 + sum(t.shape[1] ** 3 for t in beside)) / FACTORED_COLUMNS**3
    )
    # with gradients, embeddings too: 320 of 256 columns
    graded = dataclasses.replace(CALIBRATION, sensitivity="gradient")
    assert quantising(source, calibration=graded, fed_back_weights=1.0) - quantising(
        source, fed_back_weights=1.0
    ) == pytest.approx(320 * 256 + 3 * 256 * 256)
    assert quantising(source, calibration=graded, factor_seconds=1.0) - quantising(
        source, factor_seconds=1.0
    ) == pytest.approx((4 + 2 * (2 * 6 + 1)) * (256 / FACTORED_COLUMNS) ** 3)  # and each expert's outputs, once
    # and products: through down, the activation's slopes, and errors of rows to others in three matrices
    through_down = 2 * 6 * (2 * 256**2 * (256 + 256 + 2 * 2048) + 4 * 2048 * 256**2 + 3 * 256**3)
    assert quantising(source, calibration=graded, **PRODUCTS) - quantising(source, **PRODUCTS) == pytest.approx(
        through_down
    )
    # rows in turns keep eight threads busy, or as many times that as there are experts more at a time
    for calibration, scale, n_busy in ((CALIBRATION, 1, 16), (graded, 1, 8), (graded, 3, 16)):
        monkeypatch.setattr(durations, "chunk_scale", lambda *_, scale=scale: scale)
        one, many = (quantising(source, calibration=calibration, n_threads=n, fed_back_weights=1.0) for n in (1, 16))
        assert many == pytest.approx(one / n_busy)


def test_products_of_quantising(source: Source) -> None:
    found = quantising(source, Quantizer(router="none", tuning=False), **PRODUCTS)
    # tokens of the text for each expert, and of a sample of it; each gives two matrices of second moments
    moments = sum(
        2 * 2 * (N_TOKENS * 2 + 6 * 512) * 256**2 for _layer in range(2) for _matrix in ("gate and up", "down")
    )
    # all of them for attention's three matrices' common input, its output projection, and the head
    shapes = {t.name: t.shape for t in source.tensors}
    for name in ("blk.0.attn_q", "blk.0.attn_output", "blk.1.attn_q", "blk.1.attn_output", "output"):
        moments += 2 * N_TOKENS * shapes[f"{name}.weight"][1] ** 2
    fitted = EXPERT_PARAMS * 4 * 256  # to these: a product, and the root's triangle twice
    assert found == pytest.approx(3.5 * one_pass(source) + moments + fitted)
    calibrated = quantising(source, Quantizer(tuning=False), **PRODUCTS)
    assert calibrated - found > 2.5 * one_pass(source)
    tuned = quantising(source, Quantizer(), **PRODUCTS)
    assert tuned - calibrated > 4 * one_pass(source)  # all of the text once, forward twice and back
    assert quantising(source, Quantizer(feedback=False), **PRODUCTS) < 1  # no products


def test_experts_are_decoded_whenever_they_are_needed(source: Source) -> None:
    """While quantising and for routers once each; twice in each of 16 steps; before and after, two times at most."""
    without_any = Quantizer(router="none", tuning=False)
    assert quantising(source, without_any, decoded_weights=1.0) == pytest.approx(EXPERT_PARAMS)
    assert quantising(source, Quantizer(tuning=False), decoded_weights=1.0) == pytest.approx(2 * EXPERT_PARAMS)
    assert quantising(source, Quantizer(), decoded_weights=1.0) == pytest.approx((2 + 2 * 16 + 4) * EXPERT_PARAMS)


def test_everything_is_probed(source: Source) -> None:
    assert calibrating(source, probed_weights=1.0) == pytest.approx(source.n_params)


def test_products_of_calibrating(source: Source) -> None:
    plain = calibrating(source, **PRODUCTS)
    assert calibrating(source, pruned=True, **PRODUCTS) - plain == pytest.approx(one_pass(source))
    more = dataclasses.replace(CALIBRATION, n_probe_tokens=2 * CALIBRATION.n_probe_tokens)
    branches = calibrating(source, more, **PRODUCTS) - plain
    assert plain == pytest.approx(one_pass(source) + branches)
    graded = dataclasses.replace(CALIBRATION, sensitivity="gradient")
    head = 2 * N_TOKENS * 320 * 256
    moments = 2 * 2 * N_TOKENS * 256**2  # of two layers
    assert calibrating(source, graded, **PRODUCTS) - plain == pytest.approx(4 * (one_pass(source) + head) + moments)


def test_layers_that_are_run_in_16_bits(source: Source) -> None:
    """Their matrices take less time; attention, second moments and the head what they took."""
    for seconds in (quantising, calibrating):
        whole, faster = seconds(source, **PRODUCTS), seconds(source, matmul_flops=1.0, layer_flops=2.0)
        saved, of_matrices = whole - faster, seconds(source, layer_flops=1.0)
        assert saved == pytest.approx(of_matrices / 2) and 0.1 * whole < of_matrices < whole


def test_text_that_the_model_writes(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = dataclasses.replace(CALIBRATION, text_paths=(), writer="sample")
    assert calibrating(source, draw_seconds=1.0) == pytest.approx(calibrating(source), abs=1e-9)
    assert calibrating(source, sampled, draw_seconds=1.0) == pytest.approx(320 * N_TOKENS)
    balanced = dataclasses.replace(sampled, writer="ebss")
    assert calibrating(source, balanced, draw_seconds=1.0) == pytest.approx(2 * 320 * N_TOKENS)
    # 320 sequences of 64 tokens are written on the CPU, wherever the model is run otherwise
    assert calibrating(source, sampled, writer_flops=1.0) > 1 > calibrating(source, sampled)
    assert writing_seconds(source, CALIBRATION, LENGTH, NOTHING) == 0
    # 64 steps of 16 sequences side by side, each with all weights
    read = 64 * source.n_params * 8.5 / 8
    assert calibrating(source, sampled) == pytest.approx(read / durations.MEMORY_BYTES_PER_SECOND)
    monkeypatch.setattr(durations, "memory_bytes", lambda: 1)
    assert calibrating(source, sampled) == pytest.approx(read / durations.DISK_BYTES_PER_SECOND)
    # large ones write with a file of half the bits
    monkeypatch.setattr("moe2gguf.sample.HALF_BYTE_PARAMS", source.n_params)
    assert calibrating(source, sampled) == pytest.approx(4.5 / 8.5 * read / durations.DISK_BYTES_PER_SECOND)


def test_rates_of_this_machine(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    one, in_bf16 = measured_rates(source, 1), measured_rates(source, 1, torch.bfloat16)
    assert min(dataclasses.astuple(one)) > 0
    assert one.writer_flops == one.matmul_flops == one.layer_flops and in_bf16.matmul_flops != in_bf16.layer_flops
    # what others do on the machine would come into a ratio of two measurements
    monkeypatch.setattr(durations, "_seconds", lambda work: 1.0)
    one, two = measured_rates(source, 1), measured_rates(source, 2)
    assert two.encoded_weights / one.encoded_weights == 2
