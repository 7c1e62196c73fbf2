"""A model run in bfloat16: where it is chosen, and that every stage gives about what it gives in float32."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe2gguf import dtypes
from moe2gguf.capture import ExpertCapture
from moe2gguf.dtypes import settled, speed_of_bf16
from moe2gguf.errors import DeviceError
from moe2gguf.experts import CPU, find_experts
from moe2gguf.pipeline import calibrated
from moe2gguf.run import Run
from moe2gguf.settings import Calibration
from moe2gguf.source import Source, open_source
from moe2gguf.stats import CalibrationStats, load_stats
from moe2gguf.stream import LayerStream
from moe2gguf.work_folder import request_digest
from tests.conftest import cheap_measurements
from tests.test_stream import SMALL, TOKENS_BL, streamed
from tests.tiny_configs import MODEL_TYPES

# 8 bits of a float's fraction, in some ten products one after the other
ROUNDING = 0.02


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how many times as fast bfloat16 is."""
    return lambda times: monkeypatch.setattr(dtypes, "speed_of_bf16", lambda: times)


def chosen(dtype: str, source: Source, device: torch.device = CPU) -> str:
    return settled(Calibration(dtype=dtype), source, device).dtype


def test_chosen_for_large_models_where_it_is_faster(
    tiny: Callable[..., Path], faster: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, other = (open_source(tiny("qwen3_moe", dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    faster(2.2)
    assert chosen("auto", stored) == "f32"
    monkeypatch.setattr(dtypes, "BF16_PARAMS", 1e5)
    assert chosen("auto", stored) == "bf16"
    assert chosen("auto", other) == "f32"
    assert chosen("f32", stored) == "f32" and chosen("bf16", other) == "bf16"
    faster(0.7)
    assert chosen("auto", stored) == "f32" and chosen("bf16", stored) == "bf16"


def test_on_a_gpu_the_processor_does_not_matter(
    tiny: Callable[..., Path], faster: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what it traps on: a GPU that the kernels run on has units for it."""
    source, gpu = open_source(tiny("qwen3_moe", dtype=torch.bfloat16)), torch.device("cuda", 0)
    faster(0.0)
    monkeypatch.setattr(dtypes, "BF16_PARAMS", 1e5)
    assert chosen("auto", source) == "f32" and chosen("auto", source, gpu) == "bf16"
    assert chosen("bf16", source, gpu) == "bf16" and chosen("f32", source, gpu) == "f32"


def test_a_configuration_that_says_nothing(
    tiny: Callable[..., Path], tmp_path: Path, faster: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then its tensors do."""
    faster(2.2)
    monkeypatch.setattr(dtypes, "BF16_PARAMS", 1e5)
    for dtype, wanted in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        folder = shutil.copytree(tiny("qwen3_moe", dtype=dtype), tmp_path / wanted)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
        assert chosen("auto", open_source(folder)) == wanted


def test_a_processor_that_fails_to(
    tiny: Callable[..., Path], faster: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As virtual machines do that advertise units they do not have."""
    source = open_source(tiny("qwen3_moe"))
    monkeypatch.setattr(dtypes, "_PROGRAM", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    speed_of_bf16.cache_clear()
    try:
        assert speed_of_bf16() == 0
        monkeypatch.setattr(dtypes, "BF16_PARAMS", 0)
        assert chosen("auto", source) == "f32"
        with pytest.raises(DeviceError, match="--dtype f32"):
            chosen("bf16", source)
    finally:
        speed_of_bf16.cache_clear()


def test_speed_is_measured() -> None:
    assert 0 < speed_of_bf16() < 100


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture_runs_in_it(model_type: str, tiny: Callable[..., Path]) -> None:
    """Most tokens; one whose router is nearly tied goes to another expert."""
    folder = tiny(model_type, **SMALL)
    exact, _ = streamed(LayerStream(folder), TOKENS_BL)
    found, logits_BLV = streamed(stream := LayerStream(folder, torch.bfloat16), TOKENS_BL)
    assert {x.dtype for x in (*found, logits_BLV)} == {torch.float32}
    miss_BL = (found[-1] - exact[-1]).norm(dim=-1) / (exact[-1] - exact[0]).norm(dim=-1)
    assert 1e-5 < miss_BL.median() < ROUNDING
    with stream.layer(stream.n_layers - 1) as layer:
        block = find_experts(layer)
        assert block is not None
        held = {name: p.dtype for name, p in layer.named_parameters() if p.ndim > 1}
        assert block.gate_up_proj.dtype == block.module.down_proj.dtype == torch.bfloat16
        assert block.router_ED.dtype == torch.float32 == block.gate_up(0).dtype == block.down(0).dtype
        assert sum(dtype != torch.float32 for dtype in held.values()) <= 4  # experts' matrices and biases


def test_routers_stay_exact(tiny: Callable[..., Path]) -> None:
    stream = LayerStream(tiny("qwen3_moe", **SMALL, n_experts=16), torch.bfloat16)
    with stream.layer(0) as layer, torch.inference_mode():
        block = find_experts(layer)
        assert block is not None
        capture = ExpertCapture(block)
        with capture.listening():
            stream.run(0, layer, stream.embed(torch.randint(0, 300, (8, 256))))
        ids_TK = capture.selected().sort().values
        exact_TK, rounded_TK = (
            (capture.scored().to(dtype) @ block.router_ED.T.to(dtype)).topk(ids_TK.shape[1]).indices.sort().values
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert torch.equal(ids_TK, exact_TK) and not torch.equal(ids_TK, rounded_TK)


@pytest.fixture(scope="module")
def both(tiny: Callable[..., Path], small_text: Path, tmp_path_factory: pytest.TempPathFactory):
    """Statistics in f32 and in bf16."""
    source, found = open_source(tiny("qwen3_moe")), []
    for dtype in ("f32", "bf16"):
        calibration = Calibration((small_text,), n_sequences=8, sequence_tokens=64, n_probe_tokens=256, dtype=dtype)
        work = tmp_path_factory.mktemp(dtype)
        with cheap_measurements():
            stats = calibrated(source, calibration, Run(work, 2))
        assert stats.request == request_digest(source, calibration)
        assert stats.dtype == dtype == load_stats(work / "stats.safetensors").dtype
        found.append(stats)
    return found


def test_statistics_are_nearly_the_same(both: list[CalibrationStats]) -> None:
    exact, found = both
    assert exact.request != found.request
    for name, importance_K in exact.importance.items():
        np.testing.assert_allclose(found.importance[name], importance_K, rtol=0.05, atol=1e-3 * importance_K.max())
    for layer, stats in exact.layers.items():
        n_moved = np.abs(stats.n_tokens_E - found.layers[layer].n_tokens_E).sum()
        assert n_moved < 0.02 * stats.n_tokens_E.sum()
    for name, errors in exact.errors.items():
        for field in ("error_EJ", "graded_EJ", "probe_kl"):
            if (wanted := getattr(errors, field)) is not None:
                fits = np.isfinite(wanted)
                ratio = getattr(found.errors[name], field)[fits].sum() / wanted[fits].sum()
                assert ratio == pytest.approx(1, abs=0.15), f"{name}: {field}"


def test_auto_asks_for_what_it_settles_on(tiny: Callable[..., Path], small_text: Path) -> None:
    """Statistics of a machine that is faster in bfloat16 are not taken for others."""
    source, calibration = open_source(tiny("qwen3_moe")), Calibration((small_text,))
    auto, exact, rounded = (
        request_digest(source, settled(dataclasses.replace(calibration, dtype=dtype), source, CPU))
        for dtype in ("auto", "f32", "bf16")
    )
    assert auto == exact != rounded
