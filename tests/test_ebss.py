"""Expert-balanced self-sampling: what it hears of the routers, that it is more even, and what it rejects."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from moe2gguf import ebss
from moe2gguf.calibration_text import text_of
from moe2gguf.capture import LayerCapture
from moe2gguf.ebss import balance, balanced_text, is_repetitive
from moe2gguf.errors import Moe2ggufError
from moe2gguf.experts import find_experts
from moe2gguf.ggml import QuantType
from moe2gguf.gguf_file import Target, write_gguf
from moe2gguf.llama import captured_log, open_model
from moe2gguf.pipeline import calibrated, write_float
from moe2gguf.quantize import encode_tensors, plan_uniform
from moe2gguf.run import Run
from moe2gguf.sample import decode, first_token
from moe2gguf.settings import Calibration
from moe2gguf.source import KeyValue, open_source
from moe2gguf.stream import LayerStream
from tests.conftest import cheap_measurements
from tests.tiny_configs import MODEL_TYPES

N_EXPERTS, TOP_K = 6, 3

pytestmark = pytest.mark.usefixtures("needs_runtime")


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3_moe", top_k=TOP_K)


@pytest.fixture(scope="module")
def writer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_float(folder, tmp_path_factory.mktemp("ebss") / "float.gguf", ftype="f32")


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams follow the best within these short texts too."""
    monkeypatch.setattr(ebss, "SEGMENT_TOKENS", 16)


def write(writer: Path, n_sequences: int = 6, seed: int = 0, **options: Any) -> ebss.Balanced:
    return balanced_text(
        writer, n_sequences, 40, n_experts=N_EXPERTS, n_selected=TOP_K, kv_bytes_per_token=4096, n_threads=1, seed=seed,
        progress=lambda *_: None, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("said", "wanted"), [(("bos", "eos"), "bos"), (("eos",), "eos"), ((), None), (("eos", "endoftext"), "endoftext")]
)
def test_a_text_begins_as_a_document(said: tuple[str, ...], wanted: str | None, folder: Path, tmp_path: Path) -> None:
    """With what the file says, not with what llama.cpp takes for it where that is silent (token 11)."""
    ids = {"bos": 7, "eos": 9, "endoftext": 300, None: 0}
    source = open_source(folder)
    kv = [pair for pair in source.kv if not pair.key.endswith(("bos_token_id", "eos_token_id"))]
    for pair in list(kv):
        if pair.key == "tokenizer.ggml.tokens" and "endoftext" in said:
            tokens, place = list(pair.value), kv.index(pair)
            tokens[ids["endoftext"]] = "<|endoftext|>"
            kv[place] = dataclasses.replace(pair, value=tokens)
        if pair.key == "tokenizer.ggml.token_type" and "endoftext" in said:
            types, place = list(pair.value), kv.index(pair)
            types[ids["endoftext"]] = gguf.TokenType.CONTROL
            kv[place] = dataclasses.replace(pair, value=types)
    for name in {"bos", "eos"} & {*said}:
        kv.append(KeyValue(f"tokenizer.ggml.{name}_token_id", ids[name], gguf.GGUFValueType.UINT32, None))
    plan = plan_uniform(source, QuantType.BF16)
    changed = dataclasses.replace(source, kv=tuple(kv))
    path = write_gguf(changed, plan, encode_tensors(plan, 2, lambda *_: None), {}, Target(tmp_path / "a.gguf"))[0]
    with (
        captured_log() as errors,
        open_model(path, errors, sequence_tokens=16, n_batch=1, n_sequences=1, n_threads=1) as model,
    ):
        assert first_token(model) == ids[wanted]


def test_sigma_is_the_papers() -> None:
    even, one = np.full((2, 4), 5), np.array([[8, 0, 0, 0]])
    assert balance(even) == 0
    # shares 1, 0, 0, 0 around a quarter: sqrt((9/16 + 3/16) / 3)
    assert balance(one) == pytest.approx(0.5)
    assert balance(np.stack([even, even * 0 + [[1, 0, 0, 0]] * 2])).tolist() == pytest.approx([0, 0.5])


def test_repetitions_are_told() -> None:
    assert is_repetitive(np.tile([1, 2, 3], 50)) and is_repetitive(np.zeros(40, int))
    assert not is_repetitive(np.arange(100)) and not is_repetitive(np.zeros(5, int))


@torch.inference_mode()
def test_selections_are_the_models(folder: Path, writer: Path) -> None:
    """Of two sequences side by side, position by position, against transformers."""
    tokens_SL = np.random.default_rng(0).integers(0, 300, (2, 12))
    heard = ebss._Selections(TOP_K)
    counts_SLE: Any = 0
    with (
        captured_log() as errors,
        open_model(
            writer, errors, sequence_tokens=16, n_batch=2, n_sequences=2, n_threads=1, observe=heard.callback
        ) as model,
    ):
        for position in range(12):
            decode(model, tokens_SL[:, position], np.arange(2), position)
            counts_SLE = counts_SLE + heard.counts(N_EXPERTS)
    stream = LayerStream(folder)
    hidden_SLD = stream.embed(torch.from_numpy(tokens_SL))
    for index in range(2):
        with stream.layer(index) as layer:
            capture = LayerCapture(layer, find_experts(layer))
            with capture.listening():
                hidden_SLD = stream.run(index, layer, hidden_SLD)
        ids_SK = capture.selected().view(2, -1).numpy()
        expected_SE = (ids_SK[..., None] == np.arange(N_EXPERTS)).sum(1)
        # a near tie may fall the other way
        assert np.abs(counts_SLE[:, index] - expected_SE).sum() <= 2
        assert counts_SLE[:, index].sum() == 2 * 12 * TOP_K


def test_text_is_more_even_than_plain_samples(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for temperature in (1e-6, 0.5, 1e9):
        monkeypatch.setattr(ebss, "TEMPERATURE", temperature)
        found[temperature] = write(writer, n_sequences=12)
    coldest, balanced, plain = found.values()
    assert balanced.text.tokens_SL.shape == (12, 40) and balanced.n_rejected == 0
    assert len({*balanced.text.tokens_SL[:, 0].tolist()}) == 1 and len({*balanced.text.tokens_SL[:, 1].tolist()}) > 1
    assert coldest.balance < balanced.balance < plain.balance and coldest.balance < 0.8 * plain.balance


@pytest.fixture
def beams() -> ebss._Beams:
    """Of two sequences three each, of 10 tokens through a router of two experts."""
    made = object.__new__(ebss._Beams)
    made.n_groups, made._rng, made._selections = 2, np.random.default_rng(0), ebss._Selections(1)
    made._counts_GWLE = np.array([[[[8.0, 2]], [[2, 8]], [[7, 3]]]] * 2)
    made._before_LE = np.zeros((1, 2))
    return made


def test_beams_are_chosen_together(beams: ebss._Beams, monkeypatch: pytest.MonkeyPatch) -> None:
    """One leaning each way is even, though of each sequence the third beam is by itself."""
    monkeypatch.setattr(ebss, "TEMPERATURE", 1e-6)
    assert sorted(beams._chosen_G()) == [0, 1]
    # what is there already counts
    beams._before_LE = np.array([[14.0, 2]])
    assert beams._chosen_G().tolist() == [1, 1]


def test_beams_are_drawn_by_how_even_all_text_is(beams: ebss._Beams, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as exp(-len(S) σ(S) / τ) says of each pair."""
    monkeypatch.setattr(ebss, "TEMPERATURE", 6.0)
    beams._before_LE = np.array([[6.0, 4]])
    one, other = beams._counts_GWLE
    weight_WW = np.array([[np.exp(-30 * balance(beams._before_LE + a + b) / 6) for b in other] for a in one])
    found_WW = np.zeros((3, 3))
    for _ in range(4000):
        found_WW[tuple(beams._chosen_G())] += 1 / 4000
    np.testing.assert_allclose(found_WW, weight_WW / weight_WW.sum(), atol=0.03)


def test_seeds_decide(writer: Path) -> None:
    first, again, other = write(writer), write(writer), write(writer, seed=1)
    assert np.array_equal(first.text.tokens_SL, again.text.tokens_SL)
    assert not np.array_equal(first.text.tokens_SL, other.text.tokens_SL)


def test_what_repeats_itself_is_written_again(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([True, False, True, *[False] * 10])
    monkeypatch.setattr(ebss, "is_repetitive", lambda _: next(verdicts))
    found = write(writer, n_sequences=4)
    assert found.n_rejected == 2 and len(found.text.tokens_SL) == 4
    monkeypatch.setattr(ebss, "is_repetitive", lambda _: True)
    with pytest.raises(Moe2ggufError, match="repeat themselves; calibrate on --text FILE"):
        write(writer, n_sequences=2)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture_writes(
    model_type: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of random weights some repeat one token for ever."""
    monkeypatch.setattr(ebss, "is_repetitive", lambda _: False)
    source, said = open_source(tiny(model_type)), list[str]()
    calibration = Calibration(n_sequences=3, sequence_tokens=24)
    text = text_of(source, calibration, Run(tmp_path, 1, note=said.append))()
    assert text.tokens_SL.shape == (3, 24) and said == ["self-sampled texts rejected because they repeat themselves: 0"]


def test_calibrating_on_it(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    calibration = Calibration(n_sequences=4, sequence_tokens=32, n_probe_tokens=32)
    with cheap_measurements():
        stats = calibrated(open_source(folder), calibration, Run(tmp_path, 2, note=said.append))
    assert stats.text == "expert-balanced self-sampling" and stats.tokens_SL.shape == (4, 32)
    assert any("because they repeat themselves: 0" in line for line in said)
    assert any("uses the experts to within σ = " in line for line in said)
