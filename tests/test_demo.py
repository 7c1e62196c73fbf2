import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moe2gguf.demo import DemoResult, DemoRow, caption, render_demo, run_demo
from moe2gguf.errors import RuntimeMissing
from moe2gguf.runtime import find_runtime
from moe2gguf.settings import Calibration


def row(label: str, file_bytes: int, kld: float | None) -> DemoRow:
    rest = (kld, None if kld is None else 0.001, None if kld is None else 0.875)
    return DemoRow(label, Path(f"/somewhere/{label}.gguf"), file_bytes, 2.5, 30.0, 0.5, *rest, " it was")


def test_the_caption_compares_grouped_with_llama_quantize():
    result = DemoResult(
        (row("BF16", 4000, None), row("grouped", 900, 0.03), row("stock", 950, 0.04), row("Q", 1000, 0.06)),
        "Q",
        4,
        1020,
    )
    assert "grouped has 0.50 times that of llama-quantize Q, in 10.0% fewer bytes" in caption(result)
    out = io.StringIO()
    Console(file=out, width=150).print(render_demo(result))
    for expected in ("0.0300 ± 0.0010", "30.00 ± 0.50", "87.5%", "1,020 predictions", "harbour and it was"):
        assert expected in out.getvalue()


@pytest.mark.slow
def test_the_demo(tmp_path):
    try:
        find_runtime()
    except RuntimeMissing as error:
        pytest.skip(str(error))
    stages = []
    result = run_demo(
        tmp_path,
        calibration=Calibration(n_sequences=8, sequence_tokens=256, n_probe_tokens=256),
        max_chunks=2,
        progress=lambda what, done, total: stages.append(what),
    )
    base, grouped, stock, theirs = result.rows
    assert grouped.bits_per_weight == pytest.approx(2.54, abs=0.0127) and grouped.bits_per_weight <= 2.54
    assert stock.bits_per_weight <= 2.54
    assert theirs.file_bytes >= max(grouped.file_bytes, stock.file_bytes)
    assert base.kld_mean is None and base.perplexity < min(r.perplexity for r in (grouped, stock, theirs)) * 1.05
    assert grouped.kld_mean < theirs.kld_mean  # what the project is for, even on 4 % of the usual calibration
    assert all(r.completion for r in result.rows)
    record = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert [r["file_bytes"] for r in record["rows"]] == [(tmp_path / r.path.name).stat().st_size for r in result.rows]
    assert record["rows"][1]["path"] == grouped.path.name
    markdown = (tmp_path / "demo.md").read_text(encoding="utf-8")
    assert caption(result) in markdown and f"| {theirs.label} | {theirs.file_bytes:,} |" in markdown
    assert "llama-imatrix" in stages and f"llama-quantize {result.preset}" in stages
