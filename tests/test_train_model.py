"""Models put together of another's experts compute what they should before training, which goes on from where it was.

Shapes: T tokens, H hidden.
"""

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import transformers

from moe2gguf.source.checkpoint import resolve_model
from scripts import train_model
from scripts.train_model import divergence, frequent_pairs, inherit, inherit_block, top_weights, train

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
SHAPES = {
    "pairs": (
        transformers.MixtralConfig,
        {"num_local_experts": 2, "num_experts_per_tok": 2, "intermediate_size": 32, "head_dim": 16},
        0,
    ),
    "twins": (
        transformers.Qwen2MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        0,
    ),
}


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    monkeypatch.setattr(train_model, "MODELS", SHAPES)
    config = transformers.Qwen3MoeConfig(
        **TINY, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
    )
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").eval()
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


def tokens(n_sequences: int, seed: int) -> torch.Tensor:
    return torch.randint(64, (n_sequences, 32), generator=torch.Generator().manual_seed(seed))


def one_expert(block: torch.nn.Module, e: int, x_TH: torch.Tensor) -> torch.Tensor:
    gate, up = (x_TH @ block.experts.gate_up_proj[e].T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[e].T


@torch.no_grad()
def test_twins_that_are_normed_do_what_their_parent_did(teacher) -> None:
    old = teacher.model.layers[0].mlp
    new = inherit("twins", teacher, tokens(2, 0)).model.layers[0].mlp
    new.gate.norm_topk_prob = True
    seen_TH, unseen_TH = torch.randn(256, 32), torch.randn(1, 256, 32)
    inherit_block(new, old, seen_TH, noise=0)
    assert torch.allclose(new(unseen_TH), old(unseen_TH), rtol=1e-4, atol=1e-5)
    down_EHI = new.experts.down_proj
    assert not torch.allclose(down_EHI[0], down_EHI[1])  # they share its output, and unevenly
    assert torch.allclose(down_EHI[0] + down_EHI[1], 2 * old.experts.down_proj[0], atol=1e-6)


@torch.no_grad()
def test_twins_that_are_not_normed_have_the_mean_weight_their_parent_had(teacher) -> None:
    old = teacher.model.layers[0].mlp
    x_TH = torch.randn(256, 32)
    new = inherit("twins", teacher, tokens(2, 0)).model.layers[0].mlp
    inherit_block(new, old, x_TH, noise=0)
    was, now, wanted_TH = torch.zeros(4), torch.zeros(4), torch.zeros(256, 32)
    for t, x_H in enumerate(x_TH):
        chances = (old.gate.weight @ x_H).softmax(0)
        top = chances.argsort(descending=True)[:2]
        was[top] += chances[top] / chances[top].sum()
        now[top] += chances[top]
        for e in top:
            wanted_TH[t] += chances[e] * one_expert(old, e, x_H)
    for e in range(4):
        twins_TH = one_expert(new, 2 * e, x_TH) + one_expert(new, 2 * e + 1, x_TH)
        assert torch.allclose(twins_TH, 2 * was[e] / now[e] * one_expert(old, e, x_TH), rtol=1e-3, atol=1e-4)
    new.experts.down_proj.mul_((now / was).repeat_interleave(2)[:, None, None])
    assert torch.allclose(new(x_TH[None])[0], wanted_TH, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_pair_is_both_experts(teacher) -> None:
    old = teacher.model.layers[0].mlp
    x_TH = torch.randn(256, 32)
    new = inherit("pairs", teacher, tokens(2, 0)).model.layers[0].mlp
    inherit_block(new, old, x_TH, noise=0)
    old_weights_TE = top_weights(x_TH @ old.gate.weight.T, 2, normed=True)
    pairs = frequent_pairs(old_weights_TE).tolist()
    assert sorted(e for parents in pairs for e in parents) == [0, 1, 2, 3]
    weights_TM = (x_TH @ new.gate.weight.T).softmax(-1)  # top-2 of 2
    wanted_TH = torch.zeros(256, 32)
    for m, parents in enumerate(pairs):
        for e in parents:
            scale = old_weights_TE[:, e].sum() / weights_TM[:, m].sum()
            wanted_TH += weights_TM[:, m, None] * scale * one_expert(old, e, x_TH)
    assert torch.allclose(new(x_TH[None])[0], wanted_TH, rtol=1e-3, atol=1e-4)
    # its router wants what theirs did
    wanted_TM = torch.stack([old_weights_TE[:, parents].sum(-1) for parents in pairs], -1)
    assert (weights_TM - wanted_TM).abs().mean() < 0.6 * (wanted_TM.mean(0) - wanted_TM).abs().mean()


def test_experts_that_are_selected_together_pair() -> None:
    selected = [[0, 3]] * 5 + [[0, 1]] * 4 + [[1, 2]]
    weights_TE = torch.zeros(10, 4)
    for t, experts in enumerate(selected):
        weights_TE[t, experts] = 0.5
    assert frequent_pairs(weights_TE).tolist() == [[0, 3], [1, 2]]


@torch.no_grad()
def test_norms_of_queries_become_their_mean_factor(teacher) -> None:
    given = tokens(2, 0)
    model = inherit("twins", teacher, given)
    old, new = teacher.model.layers[0], model.model.layers[0].self_attn
    x_TH = old.input_layernorm(teacher.model.embed_tokens(given)).flatten(0, 1)
    for head in range(2):
        rows = slice(16 * head, 16 * head + 16)
        factors = [(x_H @ old.self_attn.q_proj.weight[rows].T).square().mean().rsqrt().item() for x_H in x_TH]
        wanted = old.self_attn.q_proj.weight[rows] * old.self_attn.q_norm.weight[:, None] * np.mean(factors)
        assert torch.allclose(new.q_proj.weight[rows], wanted, rtol=1e-3)


def test_divergence_is_that_of_distributions() -> None:
    logits, other = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    p, q = (torch.distributions.Categorical(logits=x) for x in (other, logits))
    assert divergence(logits, other) == pytest.approx(torch.distributions.kl_divergence(p, q).mean().item())


def test_a_run_cut_off_ends_with_the_same_weights(teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_model, "STEPS_PER_STATE", 1)
    tokens_SL = tokens(6, 1).numpy().astype(np.int16)

    def run(state: Path) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        model = inherit("twins", teacher, tokens(2, 0))
        start = divergence(*(m(input_ids=tokens(4, 3)).logits for m in (model, teacher))).item()
        train(model, teacher, tokens_SL, n_steps=3, rate=1e-3, seed=3, state=state)
        assert divergence(*(m(input_ids=tokens(4, 3)).logits for m in (model, teacher))).item() < start
        return model.state_dict()

    whole = run(tmp_path / "whole.pt")
    save_aside = train_model.save_aside

    def save_and_stop(content: dict, path: Path) -> None:
        save_aside(content, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_model, "save_aside", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.pt")
    monkeypatch.setattr(train_model, "save_aside", save_aside)
    again = run(tmp_path / "cut.pt")
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())


@torch.no_grad()
@pytest.mark.parametrize(("name", "most"), [("shared32", 1.0), ("mixtral8", 2.0)])
def test_the_bundled_models_heirs_predict_nearly_as_it_does(name: str, most: float) -> None:
    demo = resolve_model("demo")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    ids = tokenizer(topics["lambda"] + topics["with"] + topics["class"], verbose=False)["input_ids"][: 8 * 256]
    tokens_SL = torch.tensor(ids).view(8, 256)
    torch.manual_seed(0)
    model = inherit(name, teacher, tokens_SL[:4])
    logits, wanted = (m(input_ids=tokens_SL[4:]).logits for m in (model, teacher))
    assert 0 < divergence(logits, wanted) < most < divergence(torch.zeros_like(wanted), wanted)
