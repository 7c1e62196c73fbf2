"""Routers, norms and scales by descent: trials against whole models, and what of it gets into the file."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moe2gguf import ggml, tuning
from moe2gguf.capture import LayerCapture
from moe2gguf.codec import CODECS
from moe2gguf.experts import find_experts
from moe2gguf.ggml import QuantType
from moe2gguf.gguf_reader import read_gguf
from moe2gguf.pipeline import convert
from moe2gguf.quantised_model import QuantisedModel
from moe2gguf.router import Trials, agreement
from moe2gguf.settings import Calibration, Quantizer
from moe2gguf.source import open_source
from moe2gguf.spool import Spool, Tuned
from moe2gguf.states import by_sequence
from moe2gguf.stream import LayerStream
from moe2gguf.streams import Matrix, put_back
from moe2gguf.tuning import Judge, Trial, descended, tune
from moe2gguf.verify import verify_file
from tests.conftest import LAYOUTS, cheap_measurements
from tests.test_encode_experts import N_EXPERTS, TOKENS_SL, encode, every_expert
from tests.tiny_configs import MODEL_TYPES
from tests.tiny_moe import CORPUS, load_whole

TYPES = every_expert(QuantType.IQ2_XXS)
MATRICES = {
    name: Matrix(QuantType.Q4_0, None) for name in ("embed_tokens", "layers.0.self_attn.q_proj", "lm_head")
}  # fmt: skip
TOKENS = torch.from_numpy(TOKENS_SL)
HELD_OUT = TOKENS[::4]
ROUTER, NORM, LAST = "layers.1.mlp.gate", "layers.0.input_layernorm", "norm"
FACTOR = 1.03
SCALES = tuple(f"layers.1.experts.{e}.{m}.scales" for e, m in ((0, "gate"), (1, "up"), (1, "down")))


@pytest.fixture(scope="module")
def spool(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Spool:
    """A small qwen3_moe's experts."""
    spool = Spool(tmp_path_factory.mktemp("spool"))
    encode(tiny("qwen3_moe"), TYPES, spool)
    return spool


@pytest.fixture
def model(tiny: Callable[..., Path], spool: Spool) -> Iterator[QuantisedModel]:
    with ThreadPoolExecutor(2) as pool:
        yield QuantisedModel(LayerStream(tiny("qwen3_moe")), TYPES, MATRICES, spool, pool)


def whole_quantised(folder: Path, spool: Spool, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    model = load_whole(folder)
    modules = dict(model.model.named_modules()) | {"lm_head": model.lm_head}
    for name, matrix in MATRICES.items():
        exact_NK = modules[name].weight.data.numpy()
        modules[name].weight.data = torch.from_numpy(ggml.round_trip(exact_NK, matrix.quant_type))
    for index, layer in enumerate(model.model.layers):
        block = find_experts(layer)
        assert block is not None
        with ThreadPoolExecutor(2) as pool:
            put_back(block, {(m, e): t for (l, m, e), t in TYPES.items() if l == index}, spool, index, pool)
    for name, weight in weights.items():
        if name in SCALES:
            expert_part(model, name).mul_(weight.repeat_interleave(256, 1))
        else:
            modules[name].weight.data = weight.clone()
    return model


def expert_part(model: PreTrainedModel, name: str) -> torch.Tensor:
    """(N, K): the rows that these scales are of."""
    _, layer, _, expert, matrix, _ = name.split(".")
    experts = model.model.layers[int(layer)].mlp.experts
    if matrix == "down":
        return experts.down_proj.data[int(expert)]
    return experts.gate_up_proj.data[int(expert)].chunk(2)[matrix == "up"]


@torch.no_grad()
def kl_and_selected(exact: PreTrainedModel, found: PreTrainedModel) -> tuple[float, list[torch.Tensor]]:
    captures = [LayerCapture(layer, find_experts(layer)) for layer in found.model.layers]
    clean_SLV = exact(HELD_OUT).logits.log_softmax(-1)
    with captures[0].listening(), captures[1].listening():
        other_SLV = found(HELD_OUT).logits.log_softmax(-1)
    kl = (clean_SLV.exp() * (clean_SLV - other_SLV)).sum(-1).mean(dtype=torch.float64)
    return float(kl), [capture.selected() for capture in captures]


def stream_through(stream: LayerStream) -> torch.Tensor:
    hidden_SLD = stream.embed(TOKENS)
    for index in range(stream.n_layers):
        with stream.layer(index) as layer:
            hidden_SLD = stream.run(index, layer, hidden_SLD)
    return hidden_SLD.clone()


def test_trials_are_runs_of_whole_models(tiny: Callable[..., Path], spool: Spool, model: QuantisedModel) -> None:
    folder = tiny("qwen3_moe")
    exact = load_whole(folder)
    modules = dict(exact.model.named_modules())
    before = {name: modules[name].weight.data.clone() for name in (ROUTER, NORM, LAST)}
    rng = torch.Generator().manual_seed(0)
    after = {name: weight * (1 + 0.3 * torch.randn(weight.shape, generator=rng)) for name, weight in before.items()}
    for name in SCALES:
        before[name] = torch.ones(256, 1)
        # f16 has these exactly
        after[name] = 2.0 ** torch.randint(-1, 2, (256, 1), generator=rng)
    _, chosen = kl_and_selected(exact, exact)
    embedding = ggml.round_trip(model.stream.embedding_VD.numpy(), QuantType.Q4_0)
    judge = Judge(
        model, torch.from_numpy(embedding)[HELD_OUT], stream_through(model.stream)[::4], dict(enumerate(chosen)),
        spool, lambda *_: None,
    )  # fmt: skip
    trial = judge.trial(before, after, range(3))

    wanted_before, selected_before = kl_and_selected(exact, whole_quantised(folder, spool, before))
    wanted_after, selected = kl_and_selected(exact, whole_quantised(folder, spool, after))
    assert (trial.kl_before, trial.kl_after) == pytest.approx((wanted_before, wanted_after), rel=1e-4)
    for unit, names in enumerate(((NORM,), (ROUTER, *SCALES), (LAST,))):
        without = after | {name: before[name] for name in names}
        wanted, _ = kl_and_selected(exact, whole_quantised(folder, spool, without))
        assert trial.kl_without[unit] == pytest.approx(wanted, rel=1e-4), names
    for found, ids in ((trial.agreement_before, selected_before), (trial.agreement, selected)):
        assert found == pytest.approx(np.mean([agreement(*pair) for pair in zip(chosen, ids, strict=True)]))
    assert torch.equal(model.stream.head.weight, exact.get_output_embeddings().weight)


def test_descent_follows_the_gradient_of_the_whole_model(
    tiny: Callable[..., Path], spool: Spool, model: QuantisedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps over all of the text, by torch's Adam on the model as one."""
    monkeypatch.setattr(tuning, "N_STEPS", 3)
    monkeypatch.setattr(tuning, "per_step", lambda n_sequences, _length: n_sequences)
    folder = tiny("qwen3_moe")
    exact = load_whole(folder)
    modules = dict(exact.model.named_modules())
    before = {name: modules[name].weight.data.clone() for name in (ROUTER, NORM, LAST)}
    before |= dict.fromkeys(SCALES, torch.ones(256, 1))
    embedding = torch.from_numpy(ggml.round_trip(model.stream.embedding_VD.numpy(), QuantType.Q4_0))
    hidden = embedding[TOKENS], stream_through(model.stream)
    given, wanted = (by_sequence(hidden_SLD, 0, spool.folder) for hidden_SLD in hidden)
    found = descended(
        model, before, {}, [*range(len(TOKENS))], given, wanted, seed=0, spool=spool, progress=lambda *_: None
    )  # fmt: skip

    whole = whole_quantised(folder, spool, before)
    modules = dict(whole.model.named_modules())
    weights = {name: modules[name].weight.requires_grad_(True) for name in (ROUTER, NORM, LAST)}
    scales = {name: torch.ones(256, 1, requires_grad=True) for name in SCALES}
    weights |= scales
    unscaled = {name: expert_part(whole, name).clone() for name in SCALES}
    parametrised = whole.model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        parametrised.register_buffer(f"{name}_fixed", parametrised._parameters.pop(name).data)
    size = {name: before[name].square().mean().sqrt() for name in before}
    optimiser = torch.optim.Adam(
        [{"params": [w], "size": size[name]} for name, w in weights.items()], betas=tuning.BETAS
    )
    with torch.no_grad():
        clean_SLV = exact(TOKENS).logits.log_softmax(-1)
    kls = []
    for rise, fall in ((1 / 3, 1), (2 / 3, 2 / 3), (1, 1 / 3)):
        optimiser.zero_grad()
        with_scales(parametrised, unscaled, scales)
        kl = (clean_SLV.exp() * (clean_SLV - whole(TOKENS).logits.log_softmax(-1))).sum(-1).mean()
        kl.backward()
        kls.append(float(kl.detach()))
        for group in optimiser.param_groups:
            rate = min(tuning.MAX_LEARNING_RATE, tuning.LEARNING_RATE * kls[0])
            group["lr"] = rate * group["size"] * rise * fall
        optimiser.step()
    assert kls[2] < kls[0]
    for name, weight in weights.items():
        # where a gradient is nearly zero, Adam makes a step of its sign
        moved = (weight.detach() - before[name]).abs().mean()
        assert (found[name] - weight.detach()).abs().mean() <= 0.02 * moved, name
        assert not torch.equal(found[name], before[name])


def with_scales(experts: Any, unscaled: dict[str, torch.Tensor], scales: dict[str, torch.Tensor]) -> None:
    """The module's matrices as functions of the scales."""
    gate_up, down = experts.gate_up_proj_fixed.clone(), experts.down_proj_fixed.clone()
    for name, scale_NS in scales.items():
        _, _, _, expert, matrix, _ = name.split(".")
        first = len(scale_NS) if matrix == "up" else 0
        whole = down if matrix == "down" else gate_up
        whole[int(expert), first : first + len(scale_NS)] = unscaled[name] * scale_NS
    experts.gate_up_proj, experts.down_proj = gate_up, down


def test_only_what_helps_is_kept(tiny: Callable[..., Path], spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is better as it was goes back, and all of them if what is left does not help."""
    monkeypatch.setattr(tuning, "N_STEPS", 1)
    folder = tiny("qwen3_moe")
    asked: list[set[str]] = []

    def tuned(kl_all: float, kl_kept: float) -> Tuned:
        def trial(self: Judge, before: dict, after: dict, units: range) -> Trial:
            asked.append({name for name in after if not torch.equal(after[name], before[name])})
            return Trial(0.2, kl_all if units else kl_kept, 0.9, 0.95, {0: 0.35, 1: 0.05, 2: 0.35} if units else {})

        monkeypatch.setattr(Judge, "trial", trial)
        (spool.folder / "tuned.safetensors").unlink(missing_ok=True)
        tune(
            open_source(folder), LayerStream(folder), TOKENS_SL, TYPES, MATRICES, spool, seed=0, n_threads=2,
            progress=lambda *_: None,
        )  # fmt: skip
        found = spool.tuned()
        assert found is not None
        return found

    kept = tuned(0.1, 0.08)
    assert (kept.kl_before, kept.kl_after, kept.agreement) == (0.2, 0.08, 0.95)
    assert {"blk.0.ffn_gate_inp.weight", "blk.0.attn_q_norm.weight", "output_norm.weight"} <= kept.weights.keys()
    assert not any(name.startswith("blk.1.") for name in kept.weights)
    assert any(name.startswith("layers.1.") for name in asked[0]) and len(asked[1]) == len(kept.weights) + kept.n_scaled
    assert kept.n_scaled == 3 * N_EXPERTS
    with_scales = [spool.get(layer, "down", 1) for layer in (0, 1)]
    kept = tuned(0.3, 0.25)
    assert not kept.weights and not kept.n_scaled
    assert [np.array_equal(spool.get(layer, "down", 1), with_scales[layer]) for layer in (0, 1)] == [False, True]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float32, 1e-3, 1e-5), (torch.bfloat16, 0.03, 0.01)], ids=["f32", "bf16"]
)
def test_scales_have_the_gradient_of_the_weights_they_scale(
    model_type: str, dtype: torch.dtype, rtol: float, atol: float, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """However the architecture holds its experts, and whether it has them in every layer."""
    stream, spool = LayerStream(tiny(model_type, hidden=64, intermediate=64), dtype), Spool(tmp_path)
    index = stream.n_layers - 1
    with stream.layer(index) as layer, torch.no_grad():
        block = find_experts(layer)
        assert block is not None
        matrices = {}
        for expert in range(block.n_experts):
            first = block.gate_up(expert).chunk(len(block.first))
            matrices |= {(matrix, expert): weight for matrix, weight in zip(block.first, first, strict=True)}
            matrices["down", expert] = block.down(expert)
        blocks = {
            key: ggml.encode(weight.contiguous().numpy(), QuantType.IQ4_NL, None) for key, weight in matrices.items()
        }
        spool.put(index, blocks, [])
    types = {(index, *key): QuantType.IQ4_NL for key in blocks}
    hidden_SLD = stream.embed(TOKENS[:2])
    with ThreadPoolExecutor(1) as pool:
        model = QuantisedModel(stream, types, {}, spool, pool)
        scales = {name: torch.nn.Parameter(scale_NS) for name, scale_NS in model.scales(index, None).items()}
        with torch.no_grad():
            for scale_NS in scales.values():
                scale_NS *= 2
        with stream.layer(index, without_experts=True) as layer:
            model.prepare(index, layer, scales)
            with model.gradients(index, layer, scales):
                stream.apply(index, layer, hidden_SLD).square().sum().backward()
            block = find_experts(layer)
            assert block is not None
            gate_up_proj, down_proj = block.gate_up_proj, block.module.down_proj
            gate_up_proj.requires_grad_(True), down_proj.requires_grad_(True)
            stream.apply(index, layer, hidden_SLD).square().sum().backward()
            with torch.no_grad():
                for expert in range(block.n_experts):
                    moved = block.gate_up_rows(gate_up_proj.grad[expert].float() * gate_up_proj[expert])
                    down = block.down_rows(down_proj.grad[expert].float() * down_proj[expert])
                    both = zip((*block.first, "down"), (*moved.chunk(len(block.first)), down), strict=True)
                    for matrix, moved_NK in both:
                        scale_NS = scales[f"layers.{index}.experts.{expert}.{matrix}.scales"]
                        wanted_NS = moved_NK.unflatten(1, (-1, 32)).sum(-1) / 2
                        found_NS = torch.zeros_like(wanted_NS) if scale_NS.grad is None else scale_NS.grad
                        torch.testing.assert_close(
                            found_NS, wanted_NS, rtol=rtol, atol=atol * float(wanted_NS.abs().max())
                        )
            assert any(scale_NS.grad is not None for scale_NS in scales.values())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_tuned_of_each_architecture(
    model_type: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routers wherever there are experts, and RMS norms, each in the file as the checkpoint has it."""
    monkeypatch.setattr(tuning, "N_STEPS", 2)
    monkeypatch.setattr(Judge, "trial", lambda *_: Trial(0.2, 0.1, 0.9, 0.95, dict.fromkeys(range(9), 0.15)))
    folder, spool = tiny(model_type, hidden=64, intermediate=64), Spool(tmp_path)
    # the head alone, so that there is something to make up for; where it is the embedding, both
    matrices = dict.fromkeys(("lm_head", "embed_tokens"), Matrix(QuantType.Q4_0, None))
    tune(
        open_source(folder), LayerStream(folder), TOKENS_SL, {}, matrices, spool, seed=0, n_threads=2,
        progress=lambda *_: None,
    )  # fmt: skip
    found = spool.tuned()
    assert found is not None
    shapes = {tensor.name: tensor.shape for tensor in open_source(folder).tensors}
    has_rms_norms = model_type not in ("phimoe", "cohere2_moe")
    assert {name: weight.shape for name, weight in found.weights.items()} == {
        name: shape
        for name, shape in shapes.items()
        if name.endswith("ffn_gate_inp.weight")
        or (has_rms_norms and re.search(r"norm(_\d)?\.weight", name) and "indexer" not in name)
    }
    tensors = {tensor.name: tensor.load() for tensor in open_source(folder).tensors if tensor.name in found.weights}
    for name, weight in found.weights.items():
        assert np.isfinite(weight).all() and not np.array_equal(weight, tensors[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_file_has_what_is_kept(
    layout: str, needs_runtime: None, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the second layer and after the last, in the file's order of experts; verify knows, and the first is exact."""
    monkeypatch.setattr(Trials, "judge", lambda self, *_: ([], 0.2, 0.1))
    monkeypatch.setattr(
        tuning, "descended", lambda _model, before, *_, **__: {n: FACTOR * w for n, w in before.items()}
    )
    monkeypatch.setattr(Judge, "trial", lambda *_: Trial(0.2, 0.1, 0.9, 0.95, {0: 0.05, 1: 0.15, 2: 0.15}))
    folder = tiny("qwen3_moe")
    words = np.random.default_rng(0).choice(" ".join(CORPUS).split(), 1500)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    said: list[str] = []
    calibration = Calibration((tmp_path / "text.txt",), n_sequences=48, sequence_tokens=32, n_probe_tokens=64)

    def converted(name: str, *, is_tuned: bool) -> Path:
        with cheap_measurements():
            return convert(
                folder, tmp_path / name, bits=3.0, layout=layout, quantizer=Quantizer(tuning=is_tuned),
                calibration=calibration, work_folder=tmp_path / "work", note=said.append,
            ).path  # fmt: skip

    path = converted("tuned.gguf", is_tuned=True)
    # the second layer's experts, three of attention's matrices (ggml's encoder makes the fourth), the head
    assert any(f"tuned routers: 1, norms: 5, scales of matrices: {3 * N_EXPERTS + 3 + 1};" in line for line in said)
    for as_it_was in read_gguf(converted("as-it-was.gguf", is_tuned=False)).tensors:
        if as_it_was.type in CODECS:
            tensor = next(t for t in read_gguf(path).tensors if t.name == as_it_was.name)
            found, wanted = (ggml.decode(t.blocks(), t.type, t.shape[-1]) for t in (tensor, as_it_was))
            is_scaled = tensor.name.startswith(("blk.1.", "output.")) and "attn_output" not in tensor.name
            factor = FACTOR if is_scaled else 1.0
            limit = 2e-3 * abs(wanted).max()  # d and dmin are rounded apart
            np.testing.assert_allclose(found, wanted * factor, atol=limit, err_msg=tensor.name)
    source = open_source(folder)
    assert verify_file(path, source).ok
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    order = reader.get_field("moe2gguf.expert_order.1")
    for name in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm", "ffn_gate_inp"):
        for layer, factor in ((0, 1.0), (1, FACTOR)):
            wanted = source.tensor(f"blk.{layer}.{name}.weight").load() * np.float32(factor)
            field = reader.get_field(f"moe2gguf.expert_order.{layer}")
            if name == "ffn_gate_inp" and field is not None:
                wanted = wanted[field.contents()]
            np.testing.assert_allclose(tensors[f"blk.{layer}.{name}.weight"], wanted, rtol=1e-6)
    assert (order is None) == (layout == "stock")
    np.testing.assert_allclose(
        tensors["output_norm.weight"], source.tensor("output_norm.weight").load() * FACTOR, rtol=1e-6
    )
    flags = {key: reader.get_field(f"moe2gguf.{key}_calibrated").contents() for key in ("router", "norms")}
    assert flags == {"router": [False, True], "norms": [False, True, True]}
