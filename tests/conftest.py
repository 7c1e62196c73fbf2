"""Tiny checkpoints and their conversions, made once per session and shared: conversion is what takes the time."""

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moe2gguf.errors import RuntimeMissing
from moe2gguf.ggml import QuantType
from moe2gguf.pipeline import ConvertResult, convert
from moe2gguf.runtime import find_runtime
from moe2gguf.settings import Calibration, Quantizer
from moe2gguf.source import Source, open_source
from moe2gguf.stats import CalibrationStats, load_stats
from tests.tiny_moe import CORPUS, make_tiny

N_EXPERTS = 6
MIDDLE_BITS = 3.6
LAYOUTS = ("grouped", "stock")


@dataclasses.dataclass(frozen=True)
class Converted:
    """A tiny checkpoint as GGUF files in both layouts, from the same statistics."""

    folder: Path  # the checkpoint
    work: Path  # the statistics
    results: dict[str, ConvertResult]  # by layout
    notes: dict[str, tuple[str, ...]]


@pytest.fixture(scope="session")
def needs_runtime() -> None:
    try:
        find_runtime()
    except RuntimeMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(model_type, **options of make_tiny) -> folder, the same one for the same options. Not to be changed."""
    made: dict[tuple, Path] = {}

    def get(model_type: str, **options: Any) -> Path:
        key = (model_type, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny") / model_type
            made[key] = make_tiny(model_type, folder, **{"n_experts": N_EXPERTS, **options})
        return made[key]

    return get


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text of a few hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text("\n".join(CORPUS * 3), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_calibration(small_text: Path) -> Calibration:
    return Calibration((small_text,), n_sequences=4, sequence_tokens=32, n_probe_tokens=64)


@contextmanager
def cheap_measurements():
    """Smaller samples, faster probe types and fewer steps than a conversion's own, where a test is not about these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe2gguf.measure.MAX_ERROR_ROWS", 16)
        patch.setattr("moe2gguf.measure.MAX_MATRIX_ROWS", 32)
        patch.setattr("moe2gguf.probes.EXPERT_PROBE_TYPES", (QuantType.Q2_K, QuantType.Q3_K))
        patch.setattr("moe2gguf.probes.MATRIX_PROBE_TYPES", (QuantType.Q3_K,))
        patch.setattr("moe2gguf.tuning.N_STEPS", 4)
        yield


def quantizer_of(layout: str) -> Quantizer:
    """Of what `converted` makes: error feedback does not know layouts, and takes half of the time."""
    return Quantizer(feedback=layout == "grouped")


@pytest.fixture(scope="session")
def converted(
    needs_runtime: None,
    tiny: Callable[..., Path],
    small_calibration: Calibration,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Converted]:
    """converted(model_type, bits=…, **options of make_tiny): both layouts, made once."""
    made: dict[tuple, Converted] = {}

    def get(model_type: str, bits: float = MIDDLE_BITS, **options: Any) -> Converted:
        key = (model_type, bits, *sorted(options.items()))
        if key not in made:
            folder, out = tiny(model_type, **options), tmp_path_factory.mktemp(f"converted-{model_type}")
            results, notes = {}, {}
            for layout in LAYOUTS:
                said: list[str] = []
                with cheap_measurements():
                    results[layout] = convert(
                        folder,
                        out / f"{layout}.gguf",
                        bits=bits,
                        layout=layout,
                        calibration=small_calibration,
                        quantizer=quantizer_of(layout),
                        work_folder=out / "work",
                        note=said.append,
                    )
                notes[layout] = tuple(said)
            made[key] = Converted(folder, out / "work", results, notes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def source(converted) -> Source:
    return open_source(converted("qwen3_moe").folder)


@pytest.fixture(scope="session")
def stats(converted) -> CalibrationStats:
    return load_stats(converted("qwen3_moe").work / "stats.safetensors")
