import io
import json
import shutil
import struct

import gguf
import numpy as np
import pytest
from rich.console import Console

from moe2gguf.errors import FileFormatError, OutputError
from moe2gguf.gguf_reader import read_gguf
from moe2gguf.inspect import format_bytes, inspect_file, render_report
from moe2gguf.plot import draw_bits, plot_bits, type_shades
from tests.gguf_files import MIXED, N_EXPERTS, N_LAYERS, Q, random_orders, random_weights, write_moe


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "grouped.gguf"
    extra = {
        "moe2gguf.version": "0.1.0",
        "moe2gguf.recipe": json.dumps({"bits": 2.54}),
        "qwen3moe.expert_skip_ratio": [0.25, 0.125, 0.0],
    }
    return write_moe(path, random_weights(), expert_types=MIXED, orders=random_orders(), extra_kv=extra)


def text_of(report) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(render_report(report))
    return out.getvalue()


def test_reader_agrees_with_gguf_py(grouped):
    ours, theirs = read_gguf(grouped), gguf.GGUFReader(grouped)
    assert [(t.name, t.type, t.n_bytes, t.offset) for t in ours.tensors] == [
        (t.name, t.tensor_type, t.n_bytes, t.data_offset) for t in theirs.tensors
    ]
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        assert a.shape == tuple(reversed(b.shape.tolist()))
        assert a.blocks().tobytes() == b.data.tobytes()
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.kv[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()


def test_layers_groups_and_order(grouped):
    report = inspect_file(grouped)
    assert report.grouped and report.architecture == "qwen3moe" and report.name == "Random MoE"
    assert (report.n_layers, report.n_experts, report.n_experts_used) == (N_LAYERS, N_EXPERTS, 2)
    for layer, order in random_orders().items():
        assert report.layers[layer].expert_order == tuple(order)
        for projection in report.layers[layer].projections:
            assert projection.types == MIXED
            # expert order[i] of the checkpoint has the type of position i
            checkpoint_types = report.layers[layer].checkpoint_types(projection)
            assert [checkpoint_types[e] for e in order] == list(MIXED)
    assert sum(r.n_bytes for r in report.roles) == report.tensor_bytes == read_gguf(grouped).tensor_bytes
    assert sum(r.n_params for r in report.roles) == report.n_params == sum(w.size for w in random_weights().values())
    assert report.bits_per_weight == pytest.approx(report.tensor_bytes * 8 / report.n_params)
    assert report.thresholds["ratio"].tolist() == [0.25, 0.125, 0.0]
    assert report.provenance["moe2gguf.version"] == "0.1.0"


def test_table_shows_runs_thresholds_and_provenance(grouped):
    text = text_of(inspect_file(grouped))
    assert text.count("Q4_0×2 · Q8_0×1 · Q5_0×3") == 2 * N_LAYERS  # gate and up in one column, and down
    for expected in ("grouped", "experts, gate", "router", "skip ratio", "0.125", "2.54", "moe2gguf.version"):
        assert expected in text


def test_stock_and_dense_files(tmp_path):
    weights = random_weights()
    stock = inspect_file(write_moe(tmp_path / "stock.gguf", weights))
    assert not stock.grouped and stock.layers[0].expert_order is None
    assert "Q8_0×6" in text_of(stock)
    dense = {name: w for name, w in weights.items() if "_exps" not in name and "gate_inp" not in name}
    dense_report = inspect_file(write_moe(tmp_path / "dense.gguf", dense))
    assert dense_report.layers == () and "attention" in text_of(dense_report)
    with pytest.raises(OutputError, match="no expert tensors"):
        plot_bits(dense_report, tmp_path / "dense.png")


def test_shards_read_as_one_file(tmp_path, grouped):
    write_moe(tmp_path / "s.gguf", random_weights(), expert_types=MIXED, orders=random_orders(), split_max_tensors=9)
    shards = sorted(tmp_path.glob("s-*.gguf"))
    assert len(shards) > 2
    whole = inspect_file(grouped)
    for shard in (shards[0], shards[-1]):  # whichever is named
        report = inspect_file(shard)
        assert report.paths == tuple(shards)
        assert report.roles == whole.roles and report.layers == whole.layers
    shards[1].unlink()
    with pytest.raises(FileFormatError, match=shards[1].name):
        inspect_file(shards[0])


def test_shard_that_lost_its_name(tmp_path):
    write_moe(tmp_path / "s.gguf", random_weights(), split_max_tensors=9)
    lost = tmp_path / "lost.gguf"
    shutil.copy(min(tmp_path.glob("s-*.gguf")), lost)
    with pytest.raises(FileFormatError, match="give it back its name"):
        inspect_file(lost)


def test_not_a_gguf_file(tmp_path):
    for name, content in {"empty": b"", "text": b"hello world", "zip": b"PK\3\4" + bytes(100)}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=str(path)):
            inspect_file(path)
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileFormatError, match="a GGUF file is needed"):
            inspect_file(path)


def test_every_truncation_is_a_sentence(tmp_path, grouped):
    data = grouped.read_bytes()
    n_header_bytes = read_gguf(grouped).tensors[0].offset
    cut = tmp_path / "cut.gguf"
    # all of the header's first part, a sample of the rest, and a file that ends inside the last tensor
    for n_bytes in [*range(0, 400), *range(400, n_header_bytes, 97), n_header_bytes, len(data) - 33]:
        cut.write_bytes(data[:n_bytes])
        with pytest.raises(FileFormatError):
            inspect_file(cut)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "little-endian"),  # a big-endian file
        (
            8,
            struct.pack("<Q", 2**60),
            "truncated or damaged",
        ),  # more tensors than bytes: must not allocate for them
        (16, struct.pack("<Q", 2**60), "truncated or damaged"),
        (24, struct.pack("<Q", 2**63), "truncated or damaged"),  # length of the first key
    ],
)
def test_damaged_header(tmp_path, grouped, offset, value, message):
    data = bytearray(grouped.read_bytes())
    data[offset : offset + len(value)] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=message):
        inspect_file(path)


def test_unknown_tensor_type(tmp_path, grouped):
    data = grouped.read_bytes()
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # n_dims, two dimensions, then the type
    assert struct.unpack_from("<I", data, at)[0] == Q.Q8_0
    path = tmp_path / "unknown.gguf"
    path.write_bytes(data[:at] + struct.pack("<I", 9999) + data[at + 4 :])
    with pytest.raises(FileFormatError, match=r"blk\.0\.attn_q\.weight has type 9999"):
        inspect_file(path)


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 999, 1024, 5_649_120, 200 * 2**20, 3 * 2**40)] == [
        "0 B",
        "999 B",
        "1 KiB",
        "5.39 MiB",
        "200 MiB",
        "3072 GiB",
    ]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_deterministic(tmp_path, grouped, suffix):
    report = inspect_file(grouped)
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    plot_bits(report, first)
    plot_bits(report, second)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]  # nothing left aside


def test_plot_is_in_checkpoint_order(grouped):
    figure = draw_bits(inspect_file(grouped))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["gate and up", "down"]
    rank = {Q.Q4_0: 0, Q.Q5_0: 1, Q.Q8_0: 2}
    for axes in figure.axes:
        cells = axes.images[0].get_array()
        for layer, order in random_orders().items():
            assert cells[layer, order].tolist() == [rank[t] for t in MIXED]


def test_plot_shades_survive_greyscale():
    import matplotlib

    types = {
        Q.IQ1_S,
        Q.IQ2_XXS,
        Q.IQ2_S,
        Q.Q2_K,
        Q.IQ3_S,
        Q.Q3_K,
        Q.IQ4_XS,
        Q.Q8_0,
    }  # IQ3_S and Q3_K: equal bits
    shades = type_shades(types)
    assert list(shades.values()) == sorted(set(shades.values()))
    assert next(iter(shades)) == Q.IQ1_S and list(shades)[-1] == Q.Q8_0
    colours = matplotlib.colormaps["YlGnBu"]([0.12 + 0.84 * s for s in shades.values()])[:, :3]
    luminance = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) < 0).all()


def test_plot_refuses_other_formats(tmp_path, grouped):
    with pytest.raises(OutputError, match=r"\.png or \.svg"):
        plot_bits(inspect_file(grouped), tmp_path / "bits.gif")
    with pytest.raises(OutputError, match="cannot be written"):
        plot_bits(inspect_file(grouped), tmp_path / "absent" / "bits.png")
