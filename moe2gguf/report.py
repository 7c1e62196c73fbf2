"""A benchmark's record as tables and pictures, in Markdown and HTML. Nothing is measured here."""

from __future__ import annotations

import base64
import functools
import html
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe2gguf.errors import OutputError
from moe2gguf.inspect import format_bytes
from moe2gguf.llama_tools import Divergence
from moe2gguf.plot import Series, plot_experts, plot_kld, plot_skipping, plot_speed
from moe2gguf.record import METHODS, Cost, Rate, Record, Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Code:
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    n_text: int = 1  # columns that are text; the others are numbers


@dataclass(frozen=True)
class Picture:
    stem: str  # there are stem.png and stem.svg
    caption: str


Block = Heading | Paragraph | Code | Table | Picture


def write_report(record: Record, folder: Path, stem: str = "bench") -> tuple[Path, Path]:
    """Pictures, STEM.md and STEM.html in the folder. The same record gives the same bytes."""
    draw_pictures(record, folder, stem)
    blocks = [Heading(f"{record.data.model}: moe2gguf and its peers at equal bytes"), *full_report(record, stem)]
    markdown, page = folder / f"{stem}.md", folder / f"{stem}.html"
    _write(markdown, to_markdown(blocks))
    _write(page, to_html(blocks, folder))
    return markdown, page


def document_blocks(record: Record, record_path: Path, document: Path, others: Sequence[Record] = ()) -> list[Block]:
    """A README has the one table; any other document has all, with the pictures beside the record, and others' KLD."""
    if document.name == "README.md":
        return summary(record)
    pictures = os.path.relpath(record_path.resolve().with_suffix(""), document.resolve().parent)
    return full_report(record, Path(pictures).as_posix()) + (comparison([record, *others]) if others else [])


def write_into(document: Path, blocks: Sequence[Block]) -> None:
    """Between the marks of a document. Raises OutputError where it has none."""
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise OutputError(f"{document} has no lines {BEGIN} and {END} to write between; add them where it belongs")
    _write(document, f"{before}{BEGIN}\n{to_markdown(blocks)}{END}{after}")


def written_in(document: Path) -> str:
    """What is between the marks."""
    return document.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].lstrip("\n")


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


# ---- pictures


def draw_pictures(record: Record, folder: Path, stem: str) -> None:
    experts = record.experts
    bits_LE, share_LE = (_rectangle(rows) for rows in (experts.bits_LE, experts.share_LE))
    points = record.skip_points
    skipped = [(point.skipped, point.kld_mean) for point in points]
    faster = {
        "decoding": [(point.skipped, point.speed.decode_ratio) for point in points if point.speed],
        "prompt": [(point.skipped, point.speed.prompt_ratio) for point in points if point.speed],
    }
    drawings: dict[str, Callable[[Path], None]] = {
        "kld": lambda path: plot_kld(_series(record, lambda r: (r.bits_per_weight, _measured(r).kld_mean)), path),
        "speed": lambda path: plot_speed(
            _series(record, lambda r: (r.file_bytes, r.prompt.median)),
            _series(record, lambda r: (r.file_bytes, r.decode.median)),
            path,
        ),
        "skipping": lambda path: plot_skipping(
            {record.skip_file: skipped}, path, faster if faster["decoding"] else None
        ),
        "experts": lambda path: plot_experts(bits_LE, share_LE, experts.layers, path),
    }
    for name, draw in drawings.items():
        for suffix in (".png", ".svg"):
            draw(folder / f"{stem}-{name}{suffix}")


def _series(record: Record, point: Callable[[Row], tuple[float, float]]) -> Series:
    methods = sorted(METHODS, key=lambda method: method != "grouped")  # whose line is the plainest
    by_method = {m: [point(row) for row in record.rows[1:] if row.method == m] for m in methods}
    return {METHODS[m]: points for m, points in by_method.items() if points}


def _rectangle(rows: tuple[tuple[float, ...], ...]) -> np.ndarray:
    """(L, E), NaN where a layer has fewer experts."""
    filled = np.full((len(rows), max(map(len, rows))), np.nan)
    for l, row in enumerate(rows):
        filled[l, : len(row)] = row
    return filled


# ---- tables


# a table with a row for each file is read as long as it has no more budgets
MAX_SUMMARY_BUDGETS = 2


def summary(record: Record) -> list[Block]:
    """The one table."""
    if len(record.budgets) > MAX_SUMMARY_BUDGETS:
        return [divergence_table(record), Paragraph(f"{_tokens(record)}. {_where(record)}")]
    base = record.base
    rows = [
        (
            "BF16",
            f"{base.file_bytes:,}",
            f"{base.bits_per_weight:.3f}",
            f"{record.base_run.perplexity:.2f} ± {record.base_run.perplexity_error:.2f}",
            "",
            "",
            f"{base.decode.median:.0f}",
        )
    ]
    for row in record.rows[1:]:
        d = _measured(row)
        rows.append(
            (
                _label(row),
                f"{row.file_bytes:,}",
                f"{row.bits_per_weight:.3f}",
                f"{d.perplexity:.2f} ± {d.perplexity_error:.2f}",
                f"{d.kld_mean:.4f} ± {d.kld_error:.4f}",
                f"{d.same_top:.1%}",
                f"{row.decode.median:.0f}",
            )
        )
    headers = ("file", "bytes", "bpw", "perplexity", "mean KLD", "same top", "tokens/s")
    return [Table(headers, tuple(rows)), Paragraph(" ".join([_ratios(record), _what(record), _where(record)]))]


def divergence_table(record: Record) -> Table:
    """A column for each budget: bits, mean KL divergence by method, and grouped beside its peers."""
    columns = [{row.method: row for row in record.of_budget(budget)} for budget in record.budgets]

    def line(name: str, cell: Callable[[dict[str, Row]], str]) -> tuple[str, ...]:
        return name, *map(cell, columns)

    def kld(of: dict[str, Row], method: str) -> str:
        return f"{_measured(of[method]).kld_mean:.4f}" if method in of else ""

    def over_searched(of: dict[str, Row], method: str) -> str:
        both = [_measured(of[m]).kld_mean for m in (method, "search") if m in of]
        return f"{both[0] / both[1]:.2f} ×" if len(both) == 2 else ""

    def faster(of: dict[str, Row]) -> str:
        ratio = of["grouped"].decode.of_preset if "grouped" in of else None
        return "" if ratio is None else f"{ratio:.2f} ×"

    rows = [
        line("bytes, at most", lambda of: f"{of['preset'].file_bytes:,}"),
        line("bits per weight", lambda of: f"{of['preset'].bits_per_weight:.3f}"),
        *(
            line(name, functools.partial(kld, method=method))
            for method, name in METHODS.items()
            if any(method in of for of in columns)
        ),
        *(
            line(f"{method} over searched types", functools.partial(over_searched, method=method))
            for method in ("stock", "grouped")
        ),
        line("tokens/s, grouped over llama-quantize", faster),
    ]
    return Table(("mean KLD in the bytes of", *record.budgets), tuple(rows))


def full_report(record: Record, stem: str) -> list[Block]:
    """`stem` is that of the pictures, a path as the document has to name it."""
    blocks: list[Block] = [
        Paragraph(f"{_ratios(record)} {_what(record)}"),
        quality_table(record),
        Paragraph(
            "Of bytes: of the preset's, which are the budget. ± is one standard error, ΔNLL is paired by token. All "
            "measured by llama-perplexity of the same tree."
        ),
    ]
    if record.absent:
        reasons = "; ".join(f"{METHODS[a.method]} at {a.budget}: {a.reason}" for a in record.absent)
        blocks.append(Paragraph(f"Not there: {reasons}."))
    if record.tasks:
        rows = tuple(
            (t.file, t.task, t.metric, f"{t.value:.4f}" + ("" if t.error is None else f" ± {t.error:.4f}"))
            for t in record.tasks
        )
        blocks += [Table(("file", "task", "metric", "value"), rows, n_text=3)]
        blocks += [Paragraph("By lm-evaluation-harness through llama-cpp-python.")]
    blocks += [
        Picture(f"{stem}-kld", "KL divergence against bits per weight"),
        Picture(
            f"{stem}-experts",
            f"Bits of every expert in {record.experts.file}, and how often calibration selected it",
        ),
        speed_table(record),
        Paragraph(
            f"llama-bench, a prompt of 512 tokens and 64 tokens decoded, {record.n_rounds} rounds in which every file "
            "has its turn: medians and quartiles; ×: the median of the rounds' ratios to the preset's. Time and memory "
            "are the command's that made the file, beside what all share:"
        ),
        Table(
            ("shared", "time", "peak memory"),
            tuple((name, *_cost_cells(cost)) for name, cost in record.shared.items()),
        ),
        Picture(f"{stem}-speed", "Tokens per second against bytes"),
        skip_table(record),
        Paragraph(_skipping(record)),
        Picture(f"{stem}-skipping", f"KL divergence{_and_speed(record)} against expert activations left out"),
        Paragraph("Every file was made by one of these, in the benchmark's folder:"),
        Code(tuple(cost.command for cost in record.shared.values()) + tuple(_commands(record))),
        Paragraph(_where(record)),
        Code(_facts(record)),
    ]
    return blocks


def quality_table(record: Record) -> Table:
    rows = []
    for row in record.rows[1:]:
        d = _measured(row)
        rows.append(
            (
                _label(row),
                f"{row.file_bytes:,}",
                f"{row.file_bytes / record.preset(row.budget).file_bytes:.1%}",
                f"{d.perplexity:.3f} ± {d.perplexity_error:.3f}",
                f"{d.delta_nll:.4f} ± {d.delta_nll_error:.4f}",
                f"{d.kld_mean:.5f} ± {d.kld_error:.5f}",
                f"{d.kld_99:.3f}",
                f"{d.kld_max:.2f}",
                f"{d.same_top:.2%}",
                f"{d.skipped:.1%}" if d.skipped else "",
            )
        )
    headers = ("file", "bytes", "of bytes", "perplexity", "ΔNLL", "mean KLD", "99 %", "max", "same top", "skipped")
    return Table(headers, tuple(rows))


def speed_table(record: Record) -> Table:
    rows = []
    for row in record.rows:
        name = _label(row) if row.budget else "BF16"
        rows.append((name, *_rate_cells(row.prompt), *_rate_cells(row.decode), *_cost_cells(row.cost)))
    return Table(("file", "prompt, tokens/s", "×", "decode, tokens/s", "×", "time", "peak memory"), tuple(rows))


def comparison(records: Sequence[Record]) -> list[Block]:
    """Models against each other: KL divergence by method, and in parts of the searched types'."""
    rows = []
    for record in records:
        for budget in record.budgets:
            by_method = {row.method: _measured(row) for row in record.of_budget(budget)}
            searched = by_method.get("search")
            cells = [record.data.model, budget, f"{record.preset(budget).file_bytes:,}"]
            for method in ("preset", "search", "stock", "grouped"):
                d = by_method.get(method)
                cells.append(f"{d.kld_mean:.5f} ± {d.kld_error:.5f}" if d else "")
                if method in ("stock", "grouped"):
                    cells.append(f"{d.kld_mean / searched.kld_mean:.2f}" if d and searched else "")
            rows.append(tuple(cells))
    headers = ("model", "in the bytes of", "bytes", "preset", "searched types", "stock", "×", "grouped", "×")
    blocks: list[Block] = [
        Paragraph("Mean KLD of this and other models; ×: over that of searched types:"),
        Table(headers, tuple(rows), n_text=2),
    ]
    for record in records[1:]:
        run, data = record.base_run, record.data
        blocks.append(
            Paragraph(
                f"{data.model}: {data.n_params:,} parameters, perplexity {run.perplexity:.2f} ± "
                f"{run.perplexity_error:.2f} in BF16. {_tokens(record)}. {_where(record)}"
            )
        )
    return blocks


def skip_table(record: Record) -> Table:
    rows = []
    for point in record.skip_points:
        cells: tuple[str, ...] = (f"{point.strength:g}", f"{point.skipped:.1%}", f"{point.kld_mean:.5f}")
        if point.speed:
            ratios = (f"{ratio:.2f}" for ratio in (point.speed.prompt_ratio, point.speed.decode_ratio))
            rates = (_rate_cells(rate)[0] for rate in (point.speed.prompt, point.speed.decode))
            cells += tuple(cell for pair in zip(rates, ratios, strict=True) for cell in pair)
        rows.append(cells)
    headers: tuple[str, ...] = ("strength", "skipped", "mean KLD")
    if _and_speed(record):
        headers += ("prompt, tokens/s", "×", "decode, tokens/s", "×")
    return Table(headers, tuple(rows), n_text=0)


def _and_speed(record: Record) -> str:
    return " and speed" if record.skip_points and all(point.speed for point in record.skip_points) else ""


def _skipping(record: Record) -> str:
    text = f"Experts left out at run time: the thresholds in {record.skip_file}, scaled (LLAMA_EXPERT_SKIP)."
    if _and_speed(record):
        text += " ×: the median of the rounds' ratios to strength 0, every strength having its turn in each round."
    return text


def _label(row: Row) -> str:
    if row.method == "preset":
        return f"**{METHODS[row.method]} {row.budget}**"
    return METHODS[row.method]


def _measured(row: Row) -> Divergence:
    assert row.divergence is not None, row.file
    return row.divergence


def _rate_cells(rate: Rate) -> tuple[str, str]:
    spread = f"{rate.median:,.0f} ({rate.low:,.0f}–{rate.high:,.0f})"
    return spread, "" if rate.of_preset is None else f"{rate.of_preset:.2f}"


def _cost_cells(cost: Cost) -> tuple[str, str]:
    return f"{cost.seconds:.0f} s", "" if cost.peak_rss_bytes is None else format_bytes(cost.peak_rss_bytes)


def _ratios(record: Record) -> str:
    sentences = []
    for budget in record.budgets:
        by_method = {row.method: _measured(row).kld_mean for row in record.of_budget(budget)}
        if "grouped" not in by_method:  # out of its reach
            continue
        peers = [f"{by_method['grouped'] / by_method['preset']:.2f} times its KL divergence"]
        if "search" in by_method:
            peers.append(f"{by_method['grouped'] / by_method['search']:.2f} times that of types searched per tensor")
        sentences.append(f"In the bytes of llama-quantize {budget}, grouped has {' and '.join(peers)}.")
    return " ".join(sentences)


def _what(record: Record) -> str:
    return f"{_tokens(record)}, and none has more bytes than the preset in bold above it."


def _tokens(record: Record) -> str:
    data, run = record.data, record.base_run
    return (
        f"{data.text}: {run.n_tokens:,} predictions in {run.n_chunks} chunks of {data.n_ctx} tokens, ± one standard "
        f"error; all calibrated on the same {data.calibration_tokens:,} tokens ({data.calibration_text}, seed "
        f"{data.seed})"
    )


def _where(record: Record) -> str:
    s = record.setting
    took = f"{s.seconds / 60:.0f} minutes" if s.seconds >= 90 else f"{s.seconds:.0f} s"
    resumed = ", resumed" if s.resumed else ""
    where = f"{s.n_threads} threads of {s.processor}, {format_bytes(s.memory_bytes)}"
    return f"`{s.command}`, {where}, {s.date}; {took}{resumed}."


def _facts(record: Record) -> tuple[str, ...]:
    s, data = record.setting, record.data
    return (
        f"moe2gguf {s.version}, runtime {s.runtime}, backends {s.backends}, Python {s.python}, {s.system}",
        f"text sha256 {data.text_sha256}",
        f"calibration tokens sha256 {data.calibration_digest}, seed {data.seed}",
        *dict.fromkeys(f"{row.sha256}  {row.file}" for row in record.rows),
    )


def _commands(record: Record) -> list[str]:
    return list(dict.fromkeys(row.cost.command for row in record.rows if row.cost.command))


# ---- two ways to write blocks


def to_markdown(blocks: Sequence[Block]) -> str:
    parts = []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"# {text}\n")
            case Paragraph(text):
                parts.append(f"{text}\n")
            case Code(lines):
                parts.append("```\n" + "".join(f"{line}\n" for line in lines) + "```\n")
            case Picture(stem, caption):
                parts.append(f"![{caption}]({stem}.svg)\n")
            case Table(headers, rows, n_text):
                rule = "|---" * n_text + "|---:" * (len(headers) - n_text) + "|"
                table = [f"| {' | '.join(headers)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]
                parts.append("".join(f"{line}\n" for line in table))
    return "\n".join(parts)


_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .2em .6em; border-bottom: 1px solid #ddd; }
th, td { text-align: right; white-space: nowrap; } .text { text-align: left; }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto; font-size: 12px; }
figure { margin: 1em 0; } figure img { max-width: 100%; height: auto; }
"""


def to_html(blocks: Sequence[Block], folder: Path) -> str:
    """One page that needs no other file: the pictures in it are the folder's SVGs."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h1>{html.escape(text)}</h1>")
            case Paragraph(text):
                parts.append(f"<p>{_marked(text)}</p>")
            case Code(lines):
                parts.append(f"<pre>{html.escape(chr(10).join(lines))}</pre>")
            case Picture(stem, caption):
                svg = base64.b64encode((folder / f"{stem}.svg").read_bytes()).decode()
                image = f'<img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{svg}">'
                parts.append(f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>")
            case Table(headers, rows, n_text):
                kind = ["class=text" if i < n_text else "" for i in range(len(headers))]
                head = "".join(f"<th {k}>{html.escape(h)}</th>" for h, k in zip(headers, kind, strict=True))
                body = "".join(
                    "<tr>" + "".join(f"<td {k}>{_marked(c)}</td>" for c, k in zip(row, kind, strict=True)) + "</tr>\n"
                    for row in rows
                )
                parts.append(f"<table><tr>{head}</tr>\n{body}</table>")
    title = next((html.escape(block.text) for block in blocks if isinstance(block, Heading)), "moe2gguf bench")
    body = "\n".join(parts)
    return f'<!doctype html>\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>\n{body}\n'


def _marked(text: str) -> str:
    """Bold and code, the two marks that texts here have."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
