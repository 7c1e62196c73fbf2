"""The model card of a file: what is in it, where it comes from, how to run it, and what it costs in KL divergence."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from moe2gguf import __version__
from moe2gguf.errors import OutputError
from moe2gguf.evaluate import Evaluation
from moe2gguf.inspect import FileReport, format_bytes, inspect_file
from moe2gguf.plot import plot_bits

HASH_CHUNK_BYTES = 1 << 24


def write_card(
    file: Path,
    evaluations: Sequence[Evaluation] = (),
    *,
    text_name: str = "",
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """README.md beside the file, and a picture of its types. Raises OutputError where there is another README.md."""
    path, report = check_card(file, overwrite=overwrite), inspect_file(file)
    picture = file.with_name(f"{file.stem}-types.svg")
    if report.layers:
        plot_bits(report, picture)
    hashes = {shard: sha256_of(shard, progress) for shard in report.paths}
    aside = path.with_name(".README.md.partial")
    try:
        aside.write_text(
            _card(report, hashes, picture if report.layers else None, evaluations, text_name), encoding="utf-8"
        )
        os.replace(aside, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return path


def check_card(file: Path, *, overwrite: bool) -> Path:
    """Where the card goes. Raises OutputError where there is another README.md."""
    path = file.parent / "README.md"
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; pass --force to replace it")
    return path


def sha256_of(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(done, total)
    return digest.hexdigest()


def _card(
    report: FileReport,
    hashes: dict[Path, str],
    picture: Path | None,
    evaluations: Sequence[Evaluation],
    text_name: str,
) -> str:
    first = report.paths[0].name
    facts = report.provenance
    repository = facts.get("moe2gguf.source.repository")
    source = str(facts.get("moe2gguf.source.name", report.name))
    lines = [
        "---",
        "library_name: gguf",
        "tags: [gguf, moe, moe2gguf]",
        *([f"license: {report.licence}"] if report.licence else []),
        *([f"base_model: {repository}", "base_model_relation: quantized"] if repository else []),
        "---",
        "",
        f"# {source}, {report.bits_per_weight:.2f} bits per weight",
        "",
        f"{report.architecture}, {report.n_experts} experts per layer of which {report.n_experts_used} are used for a "
        f"token, {report.n_params:,} parameters. Made by moe2gguf {facts.get('moe2gguf.version', __version__)}.",
        "",
        "| file | bytes | sha256 |",
        "|---|---:|---|",
        *(f"| {path.name} | {path.stat().st_size:,} | `{digest}` |" for path, digest in hashes.items()),
        "",
        "## Running it",
        "",
        *_usage(report, first),
        "",
        "## What is in it",
        "",
        "| role | parameters | size | bits per weight | types |",
        "|---|---:|---:|---:|---|",
        *(
            f"| {role.name} | {role.n_params:,} | {format_bytes(role.n_bytes)} | "
            f"{role.n_bytes * 8 / role.n_params:.2f} | {', '.join(t.name for t in role.types)} |"
            for role in report.roles
        ),
        "",
    ]
    if picture is not None:
        lines += [f"![types by layer and expert]({picture.name})", ""]
    if evaluations:
        lines += ["## KL divergence", "", *_measured(evaluations, text_name), ""]
    if facts:
        lines += [
            "## Recipe",
            "",
            "```",
            *(f"{key} = {_value(value)}" for key, value in sorted(facts.items())),
            "```",
            "",
        ]
    return "\n".join(lines)


def _usage(report: FileReport, first: str) -> list[str]:
    lines = ["```python", "from llama_cpp import Llama", "", f'llm = Llama(model_path="{first}")', "```"]
    if report.grouped:
        lines += [
            "",
            "Experts have types of their own, which needs llama.cpp with moe2gguf's patches: install moe2gguf, then "
            "run `moe2gguf runtime install`.",
        ]
    if report.thresholds:
        strength = f"{report.architecture}.expert_skip_strength"
        lines += [
            "",
            "With llama.cpp as moe2gguf patches it (`moe2gguf runtime install`) it leaves out experts that matter "
            "little (others compute all); "
            f'`Llama(..., kv_overrides={{"{strength}": 0.0}})` or `LLAMA_EXPERT_SKIP=0` turns that off.',
        ]
    return lines


def _measured(evaluations: Sequence[Evaluation], text_name: str) -> list[str]:
    e = evaluations[0]
    return [
        f"{e.n_tokens:,} predictions in {e.n_chunks} chunks of {e.n_ctx} tokens of {text_name}, against the "
        f"unquantised model (perplexity {e.base_perplexity:.3f} ± {e.base_perplexity_error:.3f}); ± one standard "
        "error.",
        "",
        "| file | perplexity | mean KLD | 99 % | max | same top |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {e.path.name} | {e.perplexity:.3f} ± {e.perplexity_error:.3f} | {e.kld_mean:.5f} ± {e.kld_error:.5f} | "
            f"{e.kld_99:.4f} | {e.kld_max:.3f} | {e.same_top:.2%} |"
            for e in evaluations
        ),
    ]


def _value(value: object) -> str:
    return str(value) if isinstance(value, str) else json.dumps(value, default=lambda array: array.tolist())
