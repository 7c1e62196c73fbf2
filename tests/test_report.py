"""Tables and pictures say what the record says; README.md and BENCHMARKS.md hold the recorded run's."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from moe2gguf.errors import Moe2ggufError, OutputError
from moe2gguf.llama_tools import BaseRun, Divergence
from moe2gguf.record import (
    METHODS,
    Absent,
    Cost,
    Data,
    ExpertMap,
    Rate,
    Record,
    Row,
    Setting,
    SkipPoint,
    SkipSpeed,
    TaskScore,
    load_record,
    save_record,
)
from moe2gguf.report import (
    BEGIN,
    END,
    comparison,
    document_blocks,
    full_report,
    quality_table,
    summary,
    to_markdown,
    write_into,
    write_report,
    written_in,
)

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "benchmarks" / "demo.json"
OTHERS = [path for path in sorted(RECORDED.parent.glob("*.json")) if path != RECORDED]


def row(method: str, budget: str, n_bytes: int, kld: float | None, decode: float) -> Row:
    measured = None
    if kld is not None:
        skipped = 0.148 if method == "skipping" else None
        measured = Divergence(21.5, 0.3, 0.06, 0.01, kld, kld / 50, 8 * kld, 40 * kld, 1 - 4 * kld, 0.01, skipped)
    rates = [Rate(x, 0.9 * x, 1.1 * x, 0.97 if budget else None) for x in (5 * decode, decode)]
    name = f"{budget}-{method}.gguf" if budget else "base.gguf"
    cost = Cost(f"make {name}", 75.0, 2**31 if budget else None)
    return Row(method, budget, name, "ab" * 32, n_bytes, n_bytes * 8 / 1e6, measured, *rates, cost)


@pytest.fixture
def record() -> Record:
    rows = [row("base", "", 2_000_000, None, 100)]
    for budget, n_bytes, kld in (("IQ2_XS", 300_000, 0.10), ("IQ3_S", 450_000, 0.02)):
        shares = {"preset": 1.0, "search": 0.75, "stock": 0.4, "grouped": 0.3, "skipping": 0.35}
        rows += [row(m, budget, n_bytes - (m != "preset"), kld * share, 200) for m, share in shares.items()]
    return Record(
        setting=Setting(
            command="moe2gguf bench x",
            date="2026-01-02 03:04 UTC",
            version="0.1.0",
            runtime="0.3.36",
            python="3.11.7",
            system="Linux",
            processor="A <CPU> & co",
            backends="CPU",
            n_threads=2,
            memory_bytes=2**34,
            seconds=700.0,
            resumed=False,
        ),
        data=Data("x", 1_000_000, "text.txt", "cd" * 32, 512, "self-sampled", 65536, "ef" * 32, 0),
        base_run=BaseRun(20.25, 0.25, 8, 2040),
        rows=tuple(rows),
        absent=(Absent("pmq", "IQ3_S", "its types fill 80.0% of the preset's bytes"),),
        shared={"calibration": Cost("moe2gguf calibrate x", 90.0, 2**31), "search": Cost("probes", 60.0, None)},
        n_rounds=5,
        skip_file="IQ2_XS-grouped.gguf",
        skip_points=(SkipPoint(0.0, 0.0, 0.03), SkipPoint(1.0, 0.148, 0.035), SkipPoint(2.0, 0.3, 0.05)),
        experts=ExpertMap("IQ2_XS-grouped.gguf", (0, 2), ((2.0, 3.0, 2.5), (3.0, 2.0)), ((0.5, 1.0, 1.5), (1.2, 0.8))),
        tasks=(TaskScore("base.gguf", "arithmetic", "acc", 0.75, None),),
    )


def test_a_record_is_what_was_saved(record: Record, tmp_path: Path) -> None:
    save_record(record, tmp_path / "bench.json")
    assert load_record(tmp_path / "bench.json") == record
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]


def with_skip_speeds(record: Record) -> Record:
    def measured(decode: float) -> SkipSpeed:
        rates = [Rate(x, 0.9 * x, 1.1 * x, None) for x in (5 * decode, decode)]
        return SkipSpeed(*rates, decode / 190, decode / 200)

    return dataclasses.replace(
        record,
        skip_points=tuple(
            dataclasses.replace(point, speed=measured(200 * (1 + point.skipped))) for point in record.skip_points
        ),
    )


def test_the_skip_curve_with_speed_and_without(record: Record, tmp_path: Path) -> None:
    """A record from before speeds were in it still makes a report."""
    pictures = []
    for made, header, line, caption in (
        (record, "| strength | skipped | mean KLD |\n", "| 1 | 14.8% | 0.03500 |\n", "KL divergence against"),
        (
            with_skip_speeds(record),
            "| strength | skipped | mean KLD | prompt, tokens/s | × | decode, tokens/s | × |\n",
            "| 1 | 14.8% | 0.03500 | 1,148 (1,033–1,263) | 1.21 | 230 (207–253) | 1.15 |\n",
            "KL divergence and speed against",
        ),
    ):
        save_record(made, tmp_path / "bench.json")
        assert load_record(tmp_path / "bench.json") == made
        markdown, _ = write_report(made, tmp_path)
        text = markdown.read_text(encoding="utf-8")
        assert header in text and line in text and f"![{caption} expert activations left out]" in text
        pictures.append((tmp_path / "bench-skipping.svg").read_text(encoding="utf-8"))
    # text in the picture is drawn as outlines, whose ids name the glyphs; a second panel has axes of its own
    assert ["axes_2" in picture for picture in pictures] == [False, True]
    fields = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    for point in fields["skip_points"]:
        del point["speed"]
    (tmp_path / "bench.json").write_text(json.dumps(fields), encoding="utf-8")
    assert load_record(tmp_path / "bench.json") == record


def test_what_is_no_record_is_refused(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    with pytest.raises(Moe2ggufError, match="is no record of a benchmark"):
        load_record(path)
    save_record(record, path)
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(fields | {"format": 0}), encoding="utf-8")
    with pytest.raises(Moe2ggufError, match="in format 1"):
        load_record(path)
    del fields["rows"][0]["file_bytes"]
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(Moe2ggufError, match="file_bytes"):
        load_record(path)


def test_every_row_is_in_the_tables(record: Record) -> None:
    text = to_markdown(summary(record))
    assert "| BF16 | 2,000,000 | 16.000 | 20.25 ± 0.25 |  |  | 100 |" in text
    assert "| **llama-quantize IQ2_XS** | 300,000 | 2.400 | 21.50 ± 0.30 | 0.1000 ± 0.0020 | 60.0% | 200 |" in text
    assert "In the bytes of llama-quantize IQ2_XS, grouped has 0.30 times its KL divergence and 0.40 times" in text
    assert "2,040 predictions in 8 chunks of 512 tokens" in text and "`moe2gguf bench x`, 2 threads of A <CPU>" in text
    table = quality_table(record)
    assert len(table.rows) == len(record.rows) - 1
    assert {len(cells) for cells in table.rows} == {len(table.headers)}
    skipping = next(cells for cells in table.rows if cells[0] == METHODS["skipping"])
    assert skipping[table.headers.index("skipped")] == "14.8%"
    assert skipping[table.headers.index("of bytes")] == "100.0%"


def test_the_report_has_commands_hardware_hashes_and_what_is_absent(record: Record, tmp_path: Path) -> None:
    markdown, page = write_report(record, tmp_path)
    text = markdown.read_text(encoding="utf-8")
    for expected in (
        "make IQ3_S-search.gguf",
        "moe2gguf calibrate x",
        f"{'ab' * 32}  IQ2_XS-grouped.gguf",
        f"text sha256 {'cd' * 32}",
        "A <CPU> & co",
        "2026-01-02 03:04 UTC; 12 minutes",
        "PMQ (MC-MoE) at IQ3_S: its types fill 80.0%",
        "| base.gguf | arithmetic | acc | 0.7500 |",
        "| 1 | 14.8% | 0.03500 |",
        "| moe2gguf, grouped | 1,000 (900–1,100) | 0.97 | 200 (180–220) | 0.97 | 75 s | 2 GiB |",
    ):
        assert expected in text
    pictures = re.findall(r"\]\((bench-\w+)\.svg\)", text)
    assert pictures == ["bench-kld", "bench-experts", "bench-speed", "bench-skipping"]
    for stem in pictures:
        assert (tmp_path / f"{stem}.svg").stat().st_size > 1000 and (tmp_path / f"{stem}.png").stat().st_size > 1000
    shown = page.read_text(encoding="utf-8")
    assert shown.count("data:image/svg+xml;base64,") == 4  # the page needs no other file
    assert "A &lt;CPU&gt; &amp; co" in shown and "<CPU>" not in shown
    assert "<b>llama-quantize IQ2_XS</b>" in shown and "<code>moe2gguf bench x</code>" in shown


def test_the_same_record_gives_the_same_bytes(record: Record, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write_report(record, tmp_path / "one")
    save_record(record, tmp_path / "bench.json")
    write_report(load_record(tmp_path / "bench.json"), tmp_path / "two")
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("one", "two")
    )  # fmt: skip
    assert one == two and len(one) == 2 + 2 * 4


def test_a_document_is_written_between_its_marks(record: Record, tmp_path: Path) -> None:
    readme, other = tmp_path / "README.md", tmp_path / "docs" / "NUMBERS.md"
    other.parent.mkdir()
    for document in (readme, other):
        document.write_text(f"before\n\n{BEGIN}\nstale\n{END}\n\nafter\n", encoding="utf-8")
    recorded = tmp_path / "runs" / "x.json"
    for document in (readme, other):
        blocks = document_blocks(record, recorded, document)
        for _ in range(2):  # a second time changes nothing
            write_into(document, blocks)
            text = document.read_text(encoding="utf-8")
            assert (
                text.startswith(f"before\n\n{BEGIN}\n") and text.endswith(f"{END}\n\nafter\n") and "stale" not in text
            )
            assert written_in(document) == to_markdown(blocks)
    assert "](../runs/x-kld.svg)" in other.read_text(encoding="utf-8")
    assert ".svg" not in readme.read_text(encoding="utf-8")
    (tmp_path / "bare.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(OutputError, match="has no lines"):
        write_into(tmp_path / "bare.md", summary(record))


def test_rows_without_a_search_or_a_quartile(record: Record) -> None:
    fewer = dataclasses.replace(record, rows=tuple(r for r in record.rows if r.method != "search"), absent=(), tasks=())
    text = to_markdown(full_report(fewer, "bench"))
    assert "searched" not in text and "Not there" not in text and "lm-evaluation" not in text


def test_more_budgets_have_a_column_each(record: Record) -> None:
    more = [row("preset", "Q4_K_M", 600_000, 0.01, 200), row("grouped", "Q4_K_M", 599_999, 0.004, 200)]
    text = to_markdown(summary(dataclasses.replace(record, rows=(*record.rows, *more))))
    assert text.splitlines()[:2] == ["| mean KLD in the bytes of | IQ2_XS | IQ3_S | Q4_K_M |", "|---|---:|---:|---:|"]
    assert "| bytes, at most | 300,000 | 450,000 | 600,000 |" in text
    assert "| llama-quantize, searched types | 0.0750 | 0.0150 |  |" in text
    assert "| moe2gguf, grouped | 0.0300 | 0.0060 | 0.0040 |" in text
    assert "| stock over searched types | 0.53 × | 0.53 × |  |" in text
    assert "| grouped over searched types | 0.40 × | 0.40 × |  |" in text
    assert "| tokens/s, grouped over llama-quantize | 0.97 × | 0.97 × | 0.97 × |" in text
    assert METHODS["uniform"] not in text and "2,040 predictions" in text


def test_several_models_are_compared_by_budget(record: Record, tmp_path: Path) -> None:
    without_search = tuple(row for row in record.rows if (row.method, row.budget) != ("search", "IQ3_S"))
    wide = dataclasses.replace(record, data=dataclasses.replace(record.data, model="wide"), rows=without_search)
    text = to_markdown(comparison([record, wide]))
    with_both = "| IQ2_XS | 300,000 | 0.10000 ± 0.00200 | 0.07500 ± 0.00150 | 0.04000 ± 0.00080 | 0.53 | 0.03000 ±"
    assert f"| x {with_both}" in text and f"| wide {with_both}" in text
    assert "| wide | IQ3_S | 450,000 | 0.02000 ± 0.00040 |  | 0.00800 ± 0.00016 |  | 0.00600 ± 0.00012 |  |" in text
    assert "wide: 1,000,000 parameters, perplexity 20.25" in text and "x: 1,000,000" not in text
    document = tmp_path / "NUMBERS.md"
    alone, both = (to_markdown(document_blocks(record, tmp_path / "x.json", document, o)) for o in ([], [wide]))
    assert both == alone + "\n" + text
    readme = tmp_path / "README.md"
    assert document_blocks(record, tmp_path / "x.json", readme, [wide]) == summary(record)


@pytest.mark.parametrize("name", ["README.md", "BENCHMARKS.md"])
def test_documents_hold_the_recorded_run(name: str) -> None:
    """Nobody types the table: `make bench-record` writes it."""
    document = ROOT / name
    others = [load_record(path) for path in OTHERS]
    assert written_in(document) == to_markdown(document_blocks(load_record(RECORDED), RECORDED, document, others))
