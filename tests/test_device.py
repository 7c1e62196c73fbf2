"""A model on another device than the CPU: every stage gives what it gives without."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe2gguf import pipeline
from moe2gguf.durations import measured_rates
from moe2gguf.experts import CPU
from moe2gguf.pipeline import convert
from moe2gguf.settings import Calibration
from moe2gguf.source import open_source
from moe2gguf.stream import LayerStream
from tests.conftest import MIDDLE_BITS, cheap_measurements
from tests.pretended import DEVICE
from tests.test_stream import SMALL, TOKENS_BL, streamed


@pytest.fixture(autouse=True)
def plain_attention():
    """On the CPU, too: it sums in another order than torch's own for it."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def test_tensors_do_not_mix() -> None:
    x = torch.randn(3, 4)
    there = x.to(DEVICE)
    assert there.device == DEVICE and torch.equal((there @ there.T).to(CPU), x @ x.T)
    with pytest.raises(RuntimeError, match="on the CPU and on the device"):
        there + x


def test_a_plan_counts_on_it(tiny: Callable[..., Path]) -> None:
    rates = measured_rates(open_source(tiny("qwen3_moe")), 1, device=DEVICE)
    assert rates.layer_flops == rates.matmul_flops != rates.writer_flops


# of each kind: attention, shared experts, biases, transposed, state spaces, several streams of hidden states
MODEL_TYPES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_next", "gemma4", "glm5_next")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layers_run_there(model_type: str, tiny: Callable[..., Path]) -> None:
    folder = tiny(model_type, **SMALL)
    stream = LayerStream(folder, device=DEVICE)
    (found, logits_BLV), (wanted, wanted_BLV) = streamed(stream, TOKENS_BL), streamed(LayerStream(folder), TOKENS_BL)
    assert {x.device for x in found} == {CPU} and logits_BLV.device == DEVICE
    for ours, theirs in zip((*found, logits_BLV.to(CPU)), (*wanted, wanted_BLV), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with stream.layer(0) as layer:
        tensors = [*layer.parameters(), *layer.buffers()]
        assert {tensor.device for tensor in tensors} == {DEVICE}


@pytest.mark.parametrize(
    ("model_type", "options"), [("qwen3_moe", {"tie_word_embeddings": True}), ("gpt_oss", {})], ids=["tied", "gpt_oss"]
)
def test_the_file_is_the_same(
    model_type: str, options: dict, tiny: Callable[..., Path], small_text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All stages: pruning, statistics, gradients, error feedback, routers, tuning."""
    folder, calibration = tiny(model_type, **options), Calibration((small_text,), n_sequences=8, sequence_tokens=32)
    contents = []
    for device in (CPU, DEVICE):
        # the kernels of error feedback are the CPU's or a GPU's
        monkeypatch.setattr(pipeline, "LayerStream", lambda path, dtype, _, on=device: LayerStream(path, dtype, on))
        with cheap_measurements():
            made = convert(
                folder, tmp_path / f"{device.type}.gguf", bits=MIDDLE_BITS, calibration=calibration, prune_share=1 / 6,
                work_folder=tmp_path / device.type,
            )  # fmt: skip
        contents.append(made.path.read_bytes())
    assert len(contents[0]) == len(contents[1])
    # sums of what lies elsewhere in memory may differ in the last bit, and few codes then
    assert np.mean(np.frombuffer(contents[0], np.uint8) != np.frombuffer(contents[1], np.uint8)) < 0.01
