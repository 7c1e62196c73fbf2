"""A calibration that is cut off goes on after the last layer that it has saved, to the same statistics."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe2gguf.calibrate import Progress, calibrate
from moe2gguf.ggml import QuantType
from moe2gguf.interim import Interim, remove_interim
from moe2gguf.stats import CalibrationStats, load_stats
from moe2gguf.stream import LayerStream
from moe2gguf.text import CalibrationText
from tests.test_calibrate import assert_same

TOKENS_SL = np.random.default_rng(0).integers(0, 300, (3, 32))
# what is said first of the layer after so many, of the head, and of the gradients
STEPS = {1: "layer 2/2: statistics", 2: "probes: KL divergence", 3: "layer 1/2: gradients"}


class CutOff(Exception):
    pass


def calibrated(model: Path, work: Path, progress: Progress, request: str = "") -> CalibrationStats:
    work.mkdir(exist_ok=True)
    return calibrate(
        LayerStream(model), CalibrationText(TOKENS_SL, "random"), (QuantType.IQ4_NL, QuantType.Q5_0),
        source_sha256="", request=request, n_probe_tokens=64, sensitivity="gradient", n_threads=2, seed=0,
        scratch_folder=work, progress=progress,
    )  # fmt: skip


@pytest.fixture
def at_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe2gguf.interim.INTERIM_SECONDS", 0.0)


@pytest.mark.parametrize("n_passed", STEPS)
def test_cut_off_calibrations_go_on(
    n_passed: int, tiny: Callable[..., Path], tmp_path: Path, at_every_layer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, work = tiny("qwen3_moe", hidden=64, intermediate=32), tmp_path / "work"
    said: list[str] = []

    def cut_off(what: str, _done: int, _total: int) -> None:
        if what == STEPS[n_passed]:
            raise CutOff

    monkeypatch.setattr("moe2gguf.probes.BRANCHES_BYTES", 100_000)  # some of the streams lie on disk
    whole = calibrated(model, tmp_path / "whole", lambda *_: None)
    with pytest.raises(CutOff):
        calibrated(model, work, cut_off)
    assert [path.name for path in work.glob("calibrating-*")] == [f"calibrating-{n_passed:04}"]
    passed = Interim(work).load(whole)
    assert passed is not None and passed.n_passed == n_passed
    for changed in ({"request": "other"}, {"seed": 1}, {"digest": "of other text"}):
        assert Interim(work).load(dataclasses.replace(whole, **changed)) is None
    assert_same(calibrated(model, work, lambda what, *_: said.append(what)), whole)
    assert not any(what.startswith(f"layer {layer}/2: statistics") for what in said for layer in range(1, n_passed + 1))
    remove_interim(work)
    assert not [*work.glob("calibrating-*")]


def test_what_is_damaged_is_made_anew(tiny: Callable[..., Path], tmp_path: Path, at_every_layer: None) -> None:
    model = tiny("qwen3_moe", hidden=64, intermediate=32)
    whole = calibrated(model, tmp_path, lambda *_: None)
    (left,) = tmp_path.glob("calibrating-*")
    for name, text in (("interim.json", "{"), ("stats.safetensors", "")):
        (left / name).write_text(text)
        assert Interim(tmp_path).load(whole) is None
    assert_same(calibrated(model, tmp_path, lambda *_: None), whole)


def test_streams_that_are_cut_off_are_none(tiny: Callable[..., Path], tmp_path: Path, at_every_layer: None) -> None:
    """As after a power failure: the names are there, the data are not all."""
    model = tiny("qwen3_moe", hidden=64, intermediate=32)

    def cut_off(what: str, _done: int, _total: int) -> None:
        if what == STEPS[1]:
            raise CutOff

    with pytest.raises(CutOff):
        calibrated(model, tmp_path, cut_off)
    (left,) = tmp_path.glob("calibrating-*")
    (left / "0.f32").write_bytes((left / "0.f32").read_bytes()[:-4])
    whole = calibrated(model, tmp_path / "whole", lambda *_: None)
    assert Interim(tmp_path).load(whole) is None
    assert_same(calibrated(model, tmp_path, lambda *_: None), whole)


def test_what_another_request_left_is_not_in_the_way(
    tiny: Callable[..., Path], tmp_path: Path, at_every_layer: None
) -> None:
    model = tiny("qwen3_moe", hidden=64, intermediate=32)

    def cut_off(what: str, _done: int, _total: int) -> None:
        if what == STEPS[1]:
            raise CutOff

    for request in ("one", "other"):  # both after one layer
        with pytest.raises(CutOff):
            calibrated(model, tmp_path, cut_off, request)
    (left,) = tmp_path.glob("calibrating-*")
    assert load_stats(left / "stats.safetensors").request == "other"


def test_not_at_every_layer(tiny: Callable[..., Path], tmp_path: Path) -> None:
    calibrated(tiny("qwen3_moe", hidden=64, intermediate=32), tmp_path, lambda *_: None)
    assert not [*tmp_path.iterdir()]
