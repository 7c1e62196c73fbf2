"""Static pruning: scores against a plain loop, every architecture's checkpoint against the whole one, the file."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from moe2gguf.calibration_text import text_of
from moe2gguf.errors import Moe2ggufError, OutputError
from moe2gguf.experts import find_experts
from moe2gguf.pipeline import DEFAULT_QUANTIZER, convert
from moe2gguf.prune import RECORD, most_salient, n_kept, prune, pruned_folder, saliency, shrunk, write_pruned
from moe2gguf.run import Run
from moe2gguf.settings import Calibration, Quantizer
from moe2gguf.source import open_source
from moe2gguf.stream import LayerStream
from moe2gguf.verify import verify_file
from tests.conftest import LAYOUTS, N_EXPERTS, cheap_measurements
from tests.logits import llama_logits, transformers_logits
from tests.tiny_configs import MODEL_TYPES
from tests.tiny_moe import load_whole, with_head_ahead

TOKENS_SL = np.random.default_rng(0).integers(0, 300, (3, 16))
# routers that choose among groups of experts first
UNGROUPED = [t for t in MODEL_TYPES if t not in ("deepseek_v3", "deepseek_v32")]
VARIANTS = [*((t, {}) for t in UNGROUPED), ("gpt_oss", {"stored": "mxfp4"}), ("minimax_m2", {"stored": "fp8"})]


def silent(*_: object) -> None:
    pass


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
@torch.inference_mode()
def test_scores_are_a_loop_over_tokens(model_type: str, tiny) -> None:
    folder = tiny(model_type)
    found = saliency(LayerStream(folder), TOKENS_SL, silent)
    model = load_whole(folder)
    given: list[tuple] = []
    blocks = [find_experts(layer) for layer in model.model.layers]
    for block in blocks:
        assert block is not None
        block.module.register_forward_pre_hook(
            lambda module, args, kwargs: given.append((*args, *kwargs.values())), with_kwargs=True
        )
    model(torch.from_numpy(TOKENS_SL))
    for layer, (block, (x, ids, gates, *_)) in enumerate(zip(blocks, given, strict=True)):
        assert block is not None
        x_TD, ids_TK, gates_TK = (a.reshape(-1, a.shape[-1]) for a in (x, ids, gates))
        norms: dict[int, list[float]] = {e: [] for e in range(N_EXPERTS)}
        for x_D, ids_K, gates_K in zip(x_TD, ids_TK, gates_TK, strict=True):
            for expert, gate in zip(ids_K.tolist(), gates_K.tolist(), strict=True):
                output_1D = block.output(expert, block.activation(expert, x_D[None]))
                norms[expert].append(gate * float(output_1D.norm()))
        wanted = [np.mean(norms[e]) if norms[e] else 0.0 for e in range(N_EXPERTS)]
        np.testing.assert_allclose(found[layer], wanted, rtol=1e-4)


def test_the_first_of_equals_stay() -> None:
    assert most_salient(np.array([1.0, 3.0, 1.0, 2.0, 0.0]), 3) == [0, 1, 3]
    assert most_salient(np.zeros(4), 2) == [0, 1]


@pytest.mark.parametrize(("model_type", "options"), VARIANTS)
def test_what_is_left_is_what_was_there(model_type: str, options: dict, tiny, tmp_path: Path) -> None:
    """Another choice in every layer; every parameter beside the experts is untouched."""
    folder = tiny(model_type, **options)
    source = open_source(folder)
    layers = [i for i in range(source.n_layer) if any(f"blk.{i}.ffn_gate_inp" in t.name for t in source.tensors)]
    kept = {layer: [0, 2, 3, 5] if layer % 2 else [1, 2, 4, 5] for layer in layers}
    write_pruned(source, kept, tmp_path / "pruned", {"share": 1 / 3}, silent)

    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config[RECORD] == {"share": 1 / 3, "kept_experts": {str(l): experts for l, experts in kept.items()}}
    whole, pruned = load_whole(folder), load_whole(tmp_path / "pruned")
    left = dict(pruned.named_parameters()) | dict(pruned.named_buffers())
    n_pruned = 0
    for name, weight in [*whole.named_parameters(), *whole.named_buffers()]:
        if weight.shape == left[name].shape:
            assert torch.equal(weight, left[name])
        else:
            n_pruned += 1
            layer = int(name.split(".layers.")[1].split(".")[0])
            experts = weight[:, kept[layer]] if len(weight) == 1 else weight[kept[layer]]
            assert torch.equal(experts, left[name])
    # at least gate_up, down and router of each layer
    assert n_pruned >= 3 * len(layers)
    # the shapes that a plan supposes before are those of the checkpoint after
    found, supposed = open_source(tmp_path / "pruned"), shrunk(source, 4)
    assert {t.name: t.shape for t in found.tensors} == {t.name: t.shape for t in supposed.tensors}
    assert found.n_expert == supposed.n_expert == 4 and found.n_params == supposed.n_params
    wanted = transformers_logits(tmp_path / "pruned", TOKENS_SL[0].tolist())
    assert np.isfinite(wanted).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pruned_file(layout: str, tiny, small_calibration: Calibration, tmp_path: Path) -> None:
    folder, notes = tiny("qwen3_moe"), []

    def converted(name: str, share: float, quantizer: Quantizer = DEFAULT_QUANTIZER) -> Path:
        with cheap_measurements():
            return convert(
                folder, tmp_path / name, bits=4.0, layout=layout, calibration=small_calibration, quantizer=quantizer,
                prune_share=share, work_folder=tmp_path / "work", note=notes.append,
            ).path  # fmt: skip

    path = converted("a.gguf", 1 / 3)
    checkpoint = pruned_folder(open_source(folder), 1 / 3, tmp_path / "work")
    assert checkpoint.parent.name == "pruned-4-of-6" and any("pruned 2 of the 6 experts" in n for n in notes)
    assert verify_file(path, open_source(checkpoint)).ok
    assert not verify_file(path, open_source(folder)).ok
    reader = gguf.GGUFReader(path)
    assert reader.fields["qwen3moe.expert_count"].contents() == 4
    kept = json.loads((checkpoint / "config.json").read_text())[RECORD]["kept_experts"]
    for layer in range(2):
        assert reader.fields[f"moe2gguf.kept_experts.{layer}"].contents() == kept[str(layer)]
    # the runtime computes what transformers does with the pruned checkpoint, within what quantisation does to it
    found, wanted = (f(p, TOKENS_SL[0].tolist()) for f, p in ((llama_logits, path), (transformers_logits, checkpoint)))
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.9

    notes.clear()
    again = converted("b.gguf", 1 / 3)
    assert any("using the pruned checkpoint" in n for n in notes) and any("using the statistics" in n for n in notes)
    assert again.read_bytes() == path.read_bytes()


def test_a_checkpoint_that_answers_another_request(tiny, small_text: Path, tmp_path: Path) -> None:
    source, notes = open_source(tiny("mixtral")), []

    def run(n_sequences: int, request: str) -> None:
        calibration = Calibration((small_text,), n_sequences=n_sequences, sequence_tokens=32)
        text = text_of(source, calibration, Run(tmp_path, 1))
        prune(source, 0.5, tmp_path / "pruned", request, lambda: LayerStream(source.path), text, silent, notes.append)

    (tmp_path / "pruned.old").mkdir()  # a user's
    (tmp_path / "pruned.old" / "notes.txt").touch()
    run(2, "one")
    run(2, "one")
    run(4, "two")
    assert [n.split()[0:2] for n in notes] == [["pruned", "3"], ["using", "the"], ["the", "pruned"], ["pruned", "3"]]
    assert (tmp_path / "pruned.old" / "notes.txt").exists()
    (tmp_path / "pruned" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="is no pruned checkpoint of ours"):
        run(4, "two")


@pytest.mark.parametrize(
    ("model_type", "share", "sentence"),
    [
        ("mixtral", 0.05, "0.05 of 6 experts is less than one; prune 0.166667"),
        ("mixtral", 0.9, "leaves 1 experts of 6, and each token is routed to 2; prune 0.666667 at most"),
        ("deepseek_v3", 0.5, "chooses among 2 groups of experts first"),
    ],
)
def test_shares_out_of_reach(model_type: str, share: float, sentence: str, tiny) -> None:
    with pytest.raises(Moe2ggufError, match=sentence):
        n_kept(open_source(tiny(model_type)), share)


@pytest.mark.parametrize("model_type", ["glm4_moe", "qwen3_next"])
def test_heads_that_predict_further_tokens_go(model_type: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """They have experts, too, which the calibration text does not pass."""
    folder = tiny(model_type)
    published = with_head_ahead(folder, tmp_path / "published")
    first = 1 if model_type == "glm4_moe" else 0
    kept = {layer: [0, 2, 3, 5] for layer in range(first, open_source(folder).n_layer)}
    for checkpoint, out in ((folder, "plain"), (published, "of-published")):
        write_pruned(open_source(checkpoint), kept, tmp_path / out, {}, silent)
    wanted, found = (dict(load_whole(tmp_path / out).named_parameters()) for out in ("plain", "of-published"))
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    index = json.loads((tmp_path / "of-published" / "model.safetensors.index.json").read_text())
    assert index == json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    assert json.loads((tmp_path / "of-published" / "config.json").read_text())["num_nextn_predict_layers"] == 0
