"""The bundled model through the whole product, and one table that says whether it was worth it.

Both layouts at one size, the unquantised base, and the smallest preset of llama-quantize that is no smaller than our
files, with an importance matrix from the same text. Every figure in the table is measured here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe2gguf import __version__
from moe2gguf.errors import Moe2ggufError
from moe2gguf.evaluate import Evaluation, evaluate, held_out_text
from moe2gguf.gguf_reader import read_gguf
from moe2gguf.llama import available_cores
from moe2gguf.llama_tools import importance_matrix
from moe2gguf.peers import preset_tensor_bytes, quantize_preset
from moe2gguf.pipeline import convert, write_float
from moe2gguf.run import Progress, no_progress
from moe2gguf.runtime import find_runtime
from moe2gguf.settings import Calibration

PROMPT = "The old man walked down to the harbour and"
_N_GENERATED = 40
_BYTES_PER_CHUNK = 3000  # more than 512 tokens of any text in a vocabulary of 4096


@dataclass(frozen=True)
class DemoRow:
    """One file. The base has no divergence from itself to show."""

    label: str
    path: Path
    file_bytes: int
    bits_per_weight: float  # bytes of all tensors × 8 / parameters
    perplexity: float
    perplexity_error: float
    kld_mean: float | None  # nats per token
    kld_error: float | None
    same_top: float | None
    completion: str  # greedy, from PROMPT


@dataclass(frozen=True)
class DemoResult:
    """Rows: base, grouped, stock, llama-quantize's preset."""

    rows: tuple[DemoRow, ...]
    preset: str
    n_chunks: int
    n_tokens: int  # scored predictions

    @property
    def base(self) -> DemoRow:
        return self.rows[0]

    @property
    def grouped(self) -> DemoRow:
        return self.rows[1]

    @property
    def stock(self) -> DemoRow:
        return self.rows[2]

    @property
    def llama_quantize(self) -> DemoRow:
        return self.rows[3]


def run_demo(
    workdir: str | Path,
    *,
    bits: float = 2.54,
    calibration: Calibration | None = None,
    max_chunks: int = 32,
    n_threads: int | None = None,
    progress: Progress = no_progress,
) -> DemoResult:
    """Writes the files, their comparison as demo.json and demo.md, and the tools' logs into `workdir`.

    Raises RuntimeMissing before any work if the runtime is not installed.
    """
    find_runtime()
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("llama-*.log"):
        old.unlink()
    n_threads = n_threads or available_cores()

    base = write_float("demo", folder / "demo-BF16.gguf", ftype="bf16", progress=progress)
    encoding = f"{bits:g}bpw"
    converted = {
        layout: convert(
            "demo",
            folder / f"demo-{encoding}-{layout}.gguf",
            bits=bits,
            layout=layout,
            calibration=calibration,
            work_folder=folder / "statistics",
            overwrite=True,
            n_threads=n_threads,
            progress=progress,
        )
        for layout in ("grouped", "stock")
    }
    ours = [converted[layout].path for layout in ("grouped", "stock")]
    imatrix = folder / "imatrix.gguf"
    progress("llama-imatrix", 0, 0)
    importance_matrix(base, converted["grouped"].calibration_text, imatrix, n_threads)
    n_bytes = max(path.stat().st_size for path in ours)
    preset, theirs = _preset_of_at_least(n_bytes, base, imatrix, folder, n_threads, progress)

    candidates = [*ours, theirs]
    evaluations = evaluate(
        base,
        candidates,
        held_out_text(max_chunks * _BYTES_PER_CHUNK),
        max_chunks=max_chunks,
        n_threads=n_threads,
        progress=lambda done, total, _: progress("perplexity and KL divergence", done, total),
    )
    labels = ["BF16", "grouped", "stock", f"llama-quantize {preset}"]
    rows = []
    for i, (label, path) in enumerate(zip(labels, [base, *candidates], strict=True)):
        progress("text by each model", i, len(labels))
        rows.append(_row(label, path, evaluations[i - 1] if i else None, evaluations[0], n_threads))
    progress("text by each model", len(labels), len(labels))
    result = DemoResult(tuple(rows), preset, evaluations[0].n_chunks, evaluations[0].n_tokens)
    (folder / "demo.json").write_text(_json(result), encoding="utf-8")
    (folder / "demo.md").write_text(_markdown(result), encoding="utf-8")
    return result


def _row(label: str, path: Path, evaluation: Evaluation | None, any_evaluation: Evaluation, n_threads: int) -> DemoRow:
    file = read_gguf(path)
    return DemoRow(
        label=label,
        path=path,
        file_bytes=file.file_bytes,
        bits_per_weight=file.bits_per_weight,
        perplexity=evaluation.perplexity if evaluation else any_evaluation.base_perplexity,
        perplexity_error=evaluation.perplexity_error if evaluation else any_evaluation.base_perplexity_error,
        kld_mean=evaluation.kld_mean if evaluation else None,
        kld_error=evaluation.kld_error if evaluation else None,
        same_top=evaluation.same_top if evaluation else None,
        completion=_complete(path, n_threads),
    )


def _complete(path: Path, n_threads: int) -> str:
    """What any user of llama-cpp-python would write."""
    from llama_cpp import Llama

    model = Llama(model_path=str(path), n_ctx=256, n_threads=n_threads, verbose=False)
    try:
        completion = model(PROMPT, max_tokens=_N_GENERATED, temperature=0.0)
        assert isinstance(completion, dict)  # not a stream
        return completion["choices"][0]["text"]
    finally:
        model.close()


def _preset_of_at_least(
    n_bytes: int, base: Path, imatrix: Path, folder: Path, n_threads: int, progress: Progress
) -> tuple[str, Path]:
    """llama-quantize's smallest preset whose file has n_bytes or more."""
    file = read_gguf(base)
    header_bytes = file.file_bytes - file.tensor_bytes
    expected_bytes = {preset: header_bytes + n for preset, n in preset_tensor_bytes(base, folder).items()}
    for preset in sorted(expected_bytes, key=lambda preset: expected_bytes[preset]):
        # the dry run rounds to 0.01 MiB, and the quantised header says where the importance matrix came from
        if expected_bytes[preset] + 2**15 < n_bytes:
            continue
        progress(f"llama-quantize {preset}", 0, 0)
        path = folder / f"demo-{preset}.gguf"
        quantize_preset(preset, base, imatrix, path, n_threads, folder)
        if path.stat().st_size >= n_bytes:
            return preset, path
        path.unlink()
    raise Moe2ggufError(f"no preset of llama-quantize makes a file of {n_bytes:,} bytes; choose fewer --bits")


def caption(result: DemoResult) -> str:
    ours, theirs = result.grouped, result.llama_quantize
    assert ours.kld_mean is not None and theirs.kld_mean is not None
    ratio = ours.kld_mean / theirs.kld_mean
    fewer = 1 - ours.file_bytes / theirs.file_bytes
    return (
        f"KL divergence from BF16: grouped has {ratio:.2f} times that of llama-quantize {result.preset}, in "
        f"{fewer:.1%} fewer bytes, calibrated on the same text. {result.n_tokens:,} predictions on text that neither "
        f"training nor calibration saw; ± one standard error."
    )


def _cells(row: DemoRow) -> tuple[str, ...]:
    return (
        row.label,
        f"{row.file_bytes:,}",
        f"{row.bits_per_weight:.3f}",
        f"{row.perplexity:.2f} ± {row.perplexity_error:.2f}",
        "" if row.kld_mean is None else f"{row.kld_mean:.4f} ± {row.kld_error:.4f}",
        "" if row.same_top is None else f"{row.same_top:.1%}",
    )


_HEADERS = ("file", "bytes", "bpw", "perplexity", "mean KLD", "same top")


def render_demo(result: DemoResult) -> RenderableType:
    # narrow enough for 80 columns
    table = Table(
        title=f"The demo model, moe2gguf {__version__}",
        title_justify="left",
        header_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for i, header in enumerate(_HEADERS):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in result.rows:
        table.add_row(*_cells(row))
    texts = Table.grid(padding=(0, 2))
    texts.add_column(style="bold")
    texts.add_column()
    for row in result.rows:
        texts.add_row(row.label, Text(f"{PROMPT}{row.completion}".replace("\n", " ")))
    return Group(table, Text(caption(result)), Text(), texts)


def _markdown(result: DemoResult) -> str:
    lines = [
        "| " + " | ".join(_HEADERS) + " |",
        "|---" + "|---:" * (len(_HEADERS) - 1) + "|",
        *("| " + " | ".join(_cells(row)) + " |" for row in result.rows),
        "",
        caption(result),
        "",
        f"`moe2gguf demo`, version {__version__}; {platform.system()} {platform.machine()}, {os.cpu_count()} cores.",
    ]
    for row in result.rows:
        lines += ["", f"**{row.label}** – {PROMPT}{row.completion}".replace("\n", " ")]
    return "\n".join(lines) + "\n"


def _json(result: DemoResult) -> str:
    record = dataclasses.asdict(result) | {"version": __version__, "prompt": PROMPT}
    return json.dumps(record, indent=2, default=lambda path: path.name) + "\n"
