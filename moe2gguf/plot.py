"""Pictures: the bit-width heat-map of a file, layer × expert, one panel per projection; what a benchmark found."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from moe2gguf.errors import OutputError
from moe2gguf.ggml import bits_per_weight
from moe2gguf.inspect import FileReport, Layer, merged_projections

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL_WIDTH_INCHES = 7.0
_PANEL_HEIGHT_INCHES = 8.0
_GAP_INCHES = 0.55  # holds tick labels and an axis title
_HEAD_INCHES = 0.62
KLD_LABEL = "mean KL divergence, nats per token"
# colours of luminances apart, markers, dashes
STYLES = (
    ("#000000", "o", "-"),
    ("#0072b2", "s", "--"),
    ("#d55e00", "^", "-."),
    ("#56a0d0", "D", ":"),
    ("#6b4c9a", "v", (0, (5, 1))),
    ("#a08000", "P", (0, (3, 1, 1, 1, 1, 1))),
    ("#909090", "X", (0, (1, 2))),
)
Series = Mapping[str, Sequence[tuple[float, float]]]
# metadata without time or version
_FORMATS: dict[str, dict[str, str | None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}


def plot_bits(report: FileReport, path: str | Path) -> None:
    """Writes the heat-map to `path`, a .png or .svg. The same report gives the same bytes.

    Experts are in the checkpoint's order, so two files of one model compare cell by cell. Raises OutputError
    for another extension, for a file without experts, and where matplotlib is missing.
    """
    if not report.layers:
        raise OutputError(f"{report.paths[0]} has no expert tensors, so there is no heat-map to draw")
    _save(lambda: draw_bits(report), Path(path))


def plot_skipping(points: Series, path: str | Path, speeds: Series | None = None) -> None:
    """KL divergence against the share of expert activations left out, a line for each rule; .png or .svg. Beside it,
    where they are given, speeds against the same, relative to that with nothing left out."""

    def draw() -> Figure:
        figure, panels = _axes(2 if speeds else 1)
        _draw_series(panels[0], points, "expert activations left out", KLD_LABEL)
        panels[0].set_yscale("log")
        if speeds:
            _draw_series(panels[1], speeds, "expert activations left out", "tokens per second, none left out = 1")
            panels[0].get_legend().remove()
        for axes in panels:
            axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        return figure

    _save(draw, Path(path))


def plot_kld(points: Series, path: str | Path) -> None:
    """KL divergence against bits per weight, a line for each method; .png or .svg."""

    def draw() -> Figure:
        figure, (axes,) = _axes(1)
        _draw_series(axes, points, "bits per weight, all tensors", KLD_LABEL)
        axes.set_yscale("log")
        return figure

    _save(draw, Path(path))


def plot_speed(prompt: Series, decode: Series, path: str | Path) -> None:
    """Tokens per second against bytes of the file, a panel for prompts and one for decoding; .png or .svg."""

    def draw() -> Figure:
        figure, panels = _axes(2)
        most = max(n_bytes for points in prompt.values() for n_bytes, _ in points)
        unit, unit_bytes = ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)
        for axes, series, title in zip(panels, (prompt, decode), ("prompt", "decoding"), strict=True):
            scaled = {label: [(n / unit_bytes, speed) for n, speed in points] for label, points in series.items()}
            _draw_series(axes, scaled, f"size of the file, {unit}", "tokens per second" if title == "prompt" else "")
            axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
            axes.set_ylim(0, 1.08 * max(speed for points in series.values() for _, speed in points))
        panels[0].get_legend().remove()
        return figure

    _save(draw, Path(path))


def plot_experts(bits_LE: np.ndarray, share_LE: np.ndarray, layers: Sequence[int], path: str | Path) -> None:
    """Bits of every expert beside how often it is selected, layer × expert; .png or .svg. NaN stays blank."""

    def draw() -> Figure:
        from matplotlib.figure import Figure

        n_layers, n_experts = bits_LE.shape
        cell_inches = min(_PANEL_WIDTH_INCHES / 2 / n_experts, _PANEL_HEIGHT_INCHES / n_layers, 0.30)
        width, height = max(2.4, cell_inches * n_experts), max(0.7, cell_inches * n_layers)
        figure = Figure(figsize=(2 * width + 1.6, height + 1.0), layout="constrained")
        panels = figure.subplots(1, 2)
        # luminance falls monotonically in both, so a greyscale print keeps the order
        what = ((bits_LE, "YlGnBu", "bits per weight"), (share_LE, "Greys", "selections, 1 = an even share"))
        for axes, (values, colours, label) in zip(panels, what, strict=True):
            image = axes.imshow(
                np.ma.masked_invalid(values), cmap=colours, aspect="auto", interpolation="nearest",
                vmin=None if colours == "YlGnBu" else 0,
            )  # fmt: skip
            _ticks(axes, n_experts, layers)
            axes.set_xlabel("checkpoint expert")
            figure.colorbar(image, ax=axes, location="top", label=label, aspect=30)
        panels[0].set_ylabel("layer")
        return figure

    _save(draw, Path(path))


def _axes(n_panels: int) -> tuple[Figure, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6 + 3.4 * (n_panels - 1), 3.2), layout="constrained")
    return figure, [figure.add_subplot(1, n_panels, i + 1) for i in range(n_panels)]


def _draw_series(axes: Any, series: Series, x_label: str, y_label: str) -> None:
    # in greyscale markers and dashes tell them apart
    for (label, points), (colour, marker, dashes) in zip(series.items(), itertools.cycle(STYLES), strict=False):
        look = {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 5, "linewidth": 1.1}
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, label=label, **look)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, which="major", color="0.88")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _save(draw: Callable[[], Figure], path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise OutputError(f"{path} has extension {path.suffix or '(none)'}; a plot is written as .png or .svg")
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise OutputError("plots need matplotlib; install it with `pip install matplotlib`") from None
    aside = path.with_name(f".{path.name}.partial{suffix}")
    # ids inside an SVG are random unless salted
    with matplotlib.rc_context({"svg.hashsalt": "moe2gguf", "font.family": "DejaVu Sans", "font.size": 8}):
        figure = draw()
        try:
            figure.savefig(aside, dpi=200, metadata=_FORMATS[suffix], bbox_inches="tight", pad_inches=0.08)
            os.replace(aside, path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None
        finally:
            aside.unlink(missing_ok=True)


def type_shades(types: set[gguf.GGMLQuantizationType]) -> dict[gguf.GGMLQuantizationType, float]:
    """Types, fewest bits first, to a place on the colour scale, 0 … 1.

    Half the distance is the type's rank, so that types of nearly or exactly equal size (IQ3_S, Q3_K) still
    differ; half is its bits per weight, so that a large step in size looks large.
    """
    ordered = sorted(types, key=lambda t: (bits_per_weight(t), t.name))
    bits = np.array([bits_per_weight(t) for t in ordered])
    span = max(bits[-1] - bits[0], 1e-9)
    rank = np.arange(len(ordered)) / max(len(ordered) - 1, 1)
    return dict(zip(ordered, (rank + (bits - bits[0]) / span) / 2, strict=True))


def draw_bits(report: FileReport) -> Figure:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = merged_projections(report)
    first, last = report.layers[0].index, report.layers[-1].index
    n_rows = last - first + 1
    n_experts = max(p.n_experts for layer in report.layers for p in layer.projections)
    shades = type_shades({t for layer in report.layers for p in layer.projections for t in p.types})
    # light to dark = few to many bits; luminance falls monotonically, so a greyscale print keeps the order
    scale = matplotlib.colormaps["YlGnBu"]
    colours = [scale(0.12 + 0.84 * shade) for shade in shades.values()]
    index_of = {t: i for i, t in enumerate(shades)}

    cell_inches = min(_PANEL_WIDTH_INCHES / n_experts, _PANEL_HEIGHT_INCHES / n_rows, 0.30)
    panel_width, panel_height = cell_inches * n_experts, cell_inches * n_rows
    columns = len(panels) if n_rows > n_experts else 1  # tall panels side by side, wide ones below each other
    rows = len(panels) // columns
    width = columns * (panel_width + _GAP_INCHES)
    height = _HEAD_INCHES + rows * (panel_height + _GAP_INCHES)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    for number, (label, name) in enumerate(panels):
        left = _GAP_INCHES + number % columns * (panel_width + _GAP_INCHES)
        bottom = height - _HEAD_INCHES - number // columns * (panel_height + _GAP_INCHES) - panel_height
        axes = figure.add_axes((left / width, bottom / height, panel_width / width, panel_height / height))
        cells = np.full((n_rows, n_experts), np.nan)
        for layer in report.layers:
            cells[layer.index - first] = _row(layer, name, n_experts, index_of)
        axes.set_facecolor("white")  # a layer or a slot without expert stays blank
        axes.imshow(
            np.ma.masked_invalid(cells),
            cmap=ListedColormap(colours),
            vmin=-0.5,
            vmax=len(colours) - 0.5,
            aspect="auto",
            interpolation="nearest",
        )
        _ticks(axes, n_experts, range(first, first + n_rows))
        axes.set_title(label, loc="left", fontsize=9, fontweight="bold", pad=3)
        if number % columns == 0:
            axes.set_ylabel("layer")
        if number // columns == rows - 1:
            axes.set_xlabel("checkpoint expert")
    handles = [
        Patch(facecolor=colour, edgecolor="0.4", linewidth=0.5, label=f"{t.name}  {bits_per_weight(t):.2f}")
        for t, colour in zip(shades, colours, strict=True)
    ]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, (height - _HEAD_INCHES + 0.25) / height),
        ncols=max(1, min(len(handles), int(width / 1.2))),
        title=f"{report.name}: {report.bits_per_weight:.2f} bits per weight over the file; experts by type:",
        title_fontsize=9,
        alignment="left",
        frameon=False,
        handlelength=1.2,
        handleheight=1.2,
        borderaxespad=0.2,
    )
    return figure


def _row(layer: Layer, name: str, n_experts: int, index_of: dict[gguf.GGMLQuantizationType, int]) -> np.ndarray:
    """(n_experts,) index into the list of types; NaN where this layer has no such expert."""
    row = np.full(n_experts, np.nan)
    for projection in layer.projections:
        if projection.name == name:
            types = layer.checkpoint_types(projection)
            row[: len(types)] = [index_of[t] for t in types]
    return row


def _ticks(axes, n_experts: int, layers: Sequence[int]) -> None:
    """layers: of the rows, whose neighbours may be further apart."""
    n_rows = len(layers)
    step_x = next(s for s in (1, 2, 4, 8, 16, 32, 64) if n_experts / s <= 20 or s == 64)
    step_y = next(s for s in (1, 2, 4, 8, 16, 32) if n_rows / s <= 14 or s == 32)
    axes.set_xticks(np.arange(0, n_experts, step_x))
    ticks_y = np.arange(-layers[0] % step_y if n_rows > step_y else 0, n_rows, step_y)
    axes.set_yticks(ticks_y, [layers[int(y)] for y in ticks_y])
    # thin white lines between the cells, drawn as minor grid
    axes.set_xticks(np.arange(0.5, n_experts - 1), minor=True)
    axes.set_yticks(np.arange(0.5, n_rows - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8 if n_experts <= 32 else 0.25)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(which="major", length=2, width=0.5)
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
