"""The benchmark from end to end, on a tiny model."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from moe2gguf.bench import BYTES_APART, BenchRequest, run_bench
from moe2gguf.gguf_reader import read_gguf
from moe2gguf.peers import FLOAT_TYPES
from moe2gguf.record import Record, load_record
from moe2gguf.report import write_report

# each conversion takes a process; what makes the others differ is the allocators' and their tests'
METHODS = ("search", "stock", "grouped", "skipping")


@pytest.fixture(scope="module")
def request_(needs_runtime: None, tiny, small_text: Path) -> BenchRequest:
    return BenchRequest(
        str(tiny("qwen3_moe")),
        bits=(3.1, 3.0),  # the same preset: one budget
        methods=METHODS,
        text=small_text,
        calibration_texts=(small_text,),
        n_sequences=9,
        sequence_tokens=32,
        n_probe_tokens=64,
        n_ctx=32,
        n_chunks=9,
        n_rounds=2,
        n_threads=1,
    )


@pytest.fixture(scope="module")
def run(request_: BenchRequest, tmp_path_factory) -> tuple[Record, Path]:
    folder = tmp_path_factory.mktemp("bench")
    record, _ = run_bench(request_, folder, command="moe2gguf bench tiny")
    return record, folder


@pytest.mark.slow
def test_files_are_of_equal_bytes_and_what_they_are_said_to_be(run) -> None:
    record, folder = run
    assert len(record.budgets) == 1
    (budget,) = record.budgets
    preset = record.preset(budget)
    present = {row.method for row in record.rows}
    assert {"base", "preset", "grouped", "skipping"} <= present
    assert present | {a.method for a in record.absent} == {"base", "preset", *METHODS}
    for row in record.rows:
        path = folder / ("files" if row.budget else "") / row.file
        assert row.file_bytes == path.stat().st_size
        assert row.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for row in record.of_budget(budget):
        assert (1 - BYTES_APART) * preset.file_bytes <= row.file_bytes <= preset.file_bytes
        assert row.divergence is not None and row.divergence.kld_mean > 0
        assert row.prompt.low <= row.prompt.median <= row.prompt.high and row.decode.of_preset > 0
        assert row.cost.seconds > 0 and row.cost.peak_rss_bytes > 2**20
        assert row.cost.command.startswith(("moe2gguf convert", "llama-quantize"))


@pytest.mark.slow
def test_skipping_is_the_same_file_with_experts_left_out(run) -> None:
    record, _ = run
    by_method = {row.method: row for row in record.rows}
    grouped, skipping = by_method["grouped"], by_method["skipping"]
    assert grouped.file == skipping.file and grouped.sha256 == skipping.sha256
    assert grouped.divergence.skipped == 0 < skipping.divergence.skipped
    by_strength = {point.strength: point for point in record.skip_points}
    assert by_strength[0].kld_mean == grouped.divergence.kld_mean
    assert by_strength[1].skipped == skipping.divergence.skipped
    shares = [point.skipped for point in record.skip_points]
    assert shares == sorted(shares) and shares[-1] > shares[0]
    for point in record.skip_points:
        assert point.speed is not None and point.speed.decode.low <= point.speed.decode.median > 0
    of_none = by_strength[0].speed
    assert of_none is not None and (of_none.prompt_ratio, of_none.decode_ratio) == (1, 1)


@pytest.mark.slow
def test_the_search_chose_types_of_its_own(run) -> None:
    record, folder = run
    budget = record.budgets[0]
    if "search" not in {row.method for row in record.rows}:
        pytest.skip(f"no file of the search here: {record.absent}")
    searched, preset = (read_gguf(folder / "files" / f"{name}.gguf") for name in (f"{budget}-search", budget))
    types, of_preset = ({t.name: t.type for t in file.tensors} for file in (searched, preset))
    assert types.keys() == of_preset.keys() and types != of_preset
    assert {n for n, t in types.items() if t in FLOAT_TYPES} == {n for n, t in of_preset.items() if t in FLOAT_TYPES}


@pytest.mark.slow
def test_experts_are_drawn_as_the_checkpoint_orders_them(run) -> None:
    record, folder = run
    experts = record.experts
    file = read_gguf(folder / "files" / experts.file)
    bits_LE = np.array(experts.bits_LE)
    assert bits_LE.shape == np.array(experts.share_LE).shape == (2, 6)
    for l in range(2):
        n_bytes = sum(t.n_bytes for t in file.tensors if t.name.startswith(f"blk.{l}.ffn_") and "_exps" in t.name)
        assert bits_LE[l].mean() == pytest.approx(n_bytes * 8 / (6 * 3 * 256 * 256))
    assert np.array(experts.share_LE).mean(axis=1) == pytest.approx(1)


@pytest.mark.slow
def test_what_is_done_is_not_done_again(request_: BenchRequest, run) -> None:
    record, folder = run
    before = {path: path.stat().st_mtime_ns for path in (folder / "files").iterdir()}
    again, path = run_bench(request_, folder, command="moe2gguf bench tiny")
    assert again.setting.resumed and again.setting.seconds < record.setting.seconds / 3
    assert {path: path.stat().st_mtime_ns for path in (folder / "files").iterdir()} == before
    assert again.rows == record.rows and again.shared == record.shared
    assert load_record(path) == again
    # another text to measure on leaves the files
    fewer = dataclasses.replace(request_, n_chunks=7, n_rounds=1)
    other, _ = run_bench(fewer, folder, command="moe2gguf bench tiny")
    assert {path: path.stat().st_mtime_ns for path in (folder / "files").iterdir()} == before
    assert other.base_run.n_chunks == 7 and other.rows[1].divergence != record.rows[1].divergence


@pytest.mark.slow
def test_the_report_of_it(run, tmp_path: Path) -> None:
    record, _ = run
    markdown, page = write_report(record, tmp_path)
    assert f"llama-quantize {record.budgets[0]}" in markdown.read_text(encoding="utf-8")
    assert page.stat().st_size > 50_000
