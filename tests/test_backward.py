"""The backward sweep, layer by layer, is torch's own through the whole model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from moe2gguf import backward as stage
from moe2gguf.backward import backward
from moe2gguf.stream import LayerStream
from tests.tiny_configs import N_VOCAB
from tests.tiny_moe import load_whole

SMALL = {"hidden": 64, "intermediate": 64}
# two batches of sequences, chunks of logits that do not divide a sequence
TOKENS_SL = torch.randint(0, N_VOCAB - 1, (3, 40), generator=torch.Generator().manual_seed(0))
CHUNK_TOKENS, BATCH_SEQUENCES = 16, 2


def streamed(folder: Path, scratch: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and its gradients by what every parameter is called in the model, and by the embeddings."""
    stream = LayerStream(folder)
    found: dict[str, torch.Tensor] = {}

    def prepare(_index: int, layer: nn.Module) -> None:
        layer.requires_grad_(True)

    def finish(index: int, layer: nn.Module) -> None:
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            found[f"model.layers.{index}.{name}"] = parameter.grad

    def loss(logits_lV: torch.Tensor, sequence: int, tokens: slice) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits_lV, TOKENS_SL[sequence, tokens], reduction="sum")

    @contextmanager
    def last() -> Iterator[None]:
        weight = stream.head.weight.requires_grad_(True)
        yield
        assert weight.grad is not None
        found["lm_head.weight"] = weight.grad

    total, found["embeddings"] = backward(
        stream, stream.embed(TOKENS_SL), loss, prepare=prepare, finish=finish, batch_sequences=BATCH_SEQUENCES,
        scratch_folder=scratch, last=last,
    )  # fmt: skip
    return total, found


def whole(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    model = load_whole(folder)
    model.requires_grad_(True)
    embedding_SLD = model.get_input_embeddings()(TOKENS_SL).detach().requires_grad_(True)
    logits_SLV = model(inputs_embeds=embedding_SLD, use_cache=False).logits
    total = torch.nn.functional.cross_entropy(logits_SLV.flatten(0, 1), TOKENS_SL.flatten(), reduction="sum")
    total.backward()
    assert embedding_SLD.grad is not None
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return float(total.detach()), found | {"embeddings": embedding_SLD.grad}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("inputs_bytes", [1 << 30, 0], ids=["memory", "disk"])
def test_as_autograd_through_the_whole_model(
    model_type: str, inputs_bytes: int, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "LOGITS_CHUNK_TOKENS", CHUNK_TOKENS)
    monkeypatch.setattr(stage, "INPUTS_BYTES", inputs_bytes)
    folder = tiny(model_type, **SMALL)
    (total, found), (wanted_total, wanted) = streamed(folder, tmp_path), whole(folder)
    assert total == pytest.approx(wanted_total, rel=1e-5)
    assert wanted.keys() - found.keys() == {"model.norm.weight"}
    for name, gradient in found.items():
        scale = wanted[name].abs().max()
        assert (gradient - wanted[name]).abs().max() <= 1e-4 * scale, name
    assert not list(tmp_path.iterdir())


def test_after_a_run_in_inference_mode(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Masks and rotary tables made there serve here too."""
    folder = tiny("qwen3_moe", **SMALL)
    stream = LayerStream(folder)
    with torch.inference_mode():
        stream.embed(TOKENS_SL[:BATCH_SEQUENCES])
    hidden_SLD = stream.embed(TOKENS_SL)[:BATCH_SEQUENCES]
    total, _ = backward(
        stream, hidden_SLD, lambda logits_lV, _s, _t: logits_lV.square().sum(), prepare=lambda *_: None,
        finish=lambda *_: None, batch_sequences=BATCH_SEQUENCES, scratch_folder=tmp_path,
    )  # fmt: skip
    assert total > 0
