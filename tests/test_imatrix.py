"""llama.cpp's importance matrices: what we write, llama-quantize takes, and what llama-imatrix writes, we take."""

import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest

from moe2gguf import ggml
from moe2gguf.costs import cost_table
from moe2gguf.errors import Moe2ggufError
from moe2gguf.gguf_file import Target
from moe2gguf.imatrix import read_imatrix, write_imatrix
from moe2gguf.pipeline import write_allocation, write_float
from moe2gguf.run import Run
from moe2gguf.runtime import tool


@pytest.fixture(scope="module")
def written(source, stats, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "ours.gguf"
    write_imatrix(path, source, cost_table(source, stats, layout="stock"), stats)
    return path


def test_what_is_written_is_read(written, stats):
    found = read_imatrix(written)
    down, query = found["blk.1.ffn_down_exps.weight"], found["blk.0.attn_q.weight"]
    np.testing.assert_allclose(down, stats.layers[1].importance_down_EI, rtol=1e-6)
    np.testing.assert_allclose(query, stats.importance["layers.0.self_attn.q_proj"][None], rtol=1e-6)
    assert not written.with_name(written.name + ".partial").exists()


def test_llama_quantize_takes_it(written, source, tmp_path):
    base, out = write_float(source.path, tmp_path / "base.gguf"), tmp_path / "out.gguf"
    done = subprocess.run(
        [tool("llama-quantize"), "--imatrix", written, base, out, "IQ2_XXS", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    importance = read_imatrix(written)["blk.0.ffn_up_exps.weight"]
    tensor = next(t for t in gguf.GGUFReader(out).tensors if t.name == "blk.0.ffn_up_exps.weight")
    weight_ENK = source.tensor("blk.0.ffn_up_exps.weight").load()
    for expert, blocks_NB in enumerate(tensor.data):
        expected_NB = ggml.encode(weight_ENK[expert], tensor.tensor_type, importance[expert])
        assert np.array_equal(blocks_NB, expected_NB)


def test_quantising_with_a_file_of_llama_imatrix(converted, source, stats, tmp_path, small_text):
    base, theirs = write_float(source.path, tmp_path / "base.gguf"), tmp_path / "theirs.gguf"
    done = subprocess.run(
        [tool("llama-imatrix"), "-m", base, "-f", small_text, "-o", theirs, "-c", "32", "-t", "2"], capture_output=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = write_allocation(
        source,
        stats,
        converted("qwen3_moe").results["grouped"].allocation,
        Target(tmp_path / "out.gguf"),
        Run(tmp_path, 2),
        imatrix=theirs,
    )
    importance = read_imatrix(theirs)["blk.1.ffn_down_exps.weight"]
    reader = gguf.GGUFReader(path)
    assert reader.fields["moe2gguf.feedback"].contents() is False
    order = reader.fields["moe2gguf.expert_order.1"].contents()
    weight_ENK = source.tensor("blk.1.ffn_down_exps.weight").load()
    parts = [t for t in reader.tensors if t.name.startswith("blk.1.ffn_down_exps.")]
    stored = [(tensor.tensor_type, blocks_NB) for tensor in parts for blocks_NB in tensor.data]
    for expert, (quant_type, blocks_NB) in zip(order, stored, strict=True):
        assert np.array_equal(blocks_NB, ggml.encode(weight_ENK[expert], quant_type, importance[expert]))


def imatrix_of(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, arch="imatrix")
    for name, values in tensors.items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_expert_that_saw_nothing_weighs_all_alike(tmp_path):
    sums_EK, counts_E1 = np.array([[2, 4], [0, 0]]), np.array([[2], [0]])
    path = imatrix_of(tmp_path / "i.gguf", {"a.in_sum2": sums_EK, "a.counts": counts_E1})
    np.testing.assert_array_equal(read_imatrix(path)["a"], [[1, 2], [1, 1]])


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"weight": np.ones((2, 2))}, "holds no importance matrix"),
        ({"a.in_sum2": np.ones((1, 2))}, "has a.in_sum2 without a.counts; it is damaged"),
        (
            {
                "blk.0.ffn_down_exps.weight.in_sum2": np.ones((6, 64)),
                "blk.0.ffn_down_exps.weight.counts": np.ones((6, 1)),
            },
            "has 6 x 64 values for blk.0.ffn_down_exps.weight, which needs 6 x 256; it was made on another model",
        ),
        ({"a.in_sum2": np.ones((1, 2)), "a.counts": np.ones((1, 1))}, "knows none of the model's tensors"),
    ],
    ids=["no imatrix", "no counts", "other shape", "other names"],
)
def test_wrong_files_are_refused(converted, source, stats, tmp_path, tensors, complaint):
    path = imatrix_of(tmp_path / "i.gguf", tensors)
    allocation = converted("qwen3_moe").results["grouped"].allocation
    with pytest.raises(Moe2ggufError, match=complaint):
        write_allocation(source, stats, allocation, Target(tmp_path / "o.gguf"), Run(tmp_path, 2), imatrix=path)
    assert not (tmp_path / "o.gguf").exists()


def test_the_old_format_is_refused(tmp_path):
    path = tmp_path / "old.imatrix"
    path.write_bytes(b"\x03\x00\x00\x00old")
    with pytest.raises(Moe2ggufError, match="is no GGUF"):
        read_imatrix(path)
