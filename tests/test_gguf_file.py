import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest

from moe2gguf.costs import cost_table
from moe2gguf.errors import BudgetError, OutputError
from moe2gguf.fitting import fit_budget
from moe2gguf.ggml import QuantType as Q
from moe2gguf.gguf_file import Target, ValueType, check_target, file_bytes, file_type, write_gguf
from moe2gguf.pipeline import convert, outfile_for, write_allocation, write_float
from moe2gguf.provenance import provenance
from moe2gguf.quantize import FilePlan, TensorPlan, encode_tensors, plan_uniform
from moe2gguf.run import Run
from moe2gguf.settings import Budget, Choice
from moe2gguf.source import KeyValue, Source, SourceTensor, open_source
from moe2gguf.stats import load_stats
from tests.conftest import cheap_measurements, quantizer_of

N_EXPERTS, HIDDEN = 4, 64


def random_source(folder: Path, arch: str = "qwen3moe") -> Source:
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (32, HIDDEN),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate_inp.weight": (N_EXPERTS, HIDDEN),
        "blk.0.ffn_up_exps.weight": (N_EXPERTS, 32, HIDDEN),
    }
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return Source(
        path=folder,
        hparams={},
        arch=arch,
        name="Random",
        n_layer=1,
        n_expert=N_EXPERTS,
        n_expert_used=2,
        n_expert_groups=1,
        tensors=tuple(
            SourceTensor(name, w.shape, w.ndim > 1 and "inp" not in name, w.copy) for name, w in weights.items()
        ),
        kv=(
            KeyValue("general.architecture", arch, ValueType.STRING, None),
            KeyValue("general.file_type", 0, ValueType.UINT32, None),
            KeyValue(f"{arch}.expert_count", N_EXPERTS, ValueType.UINT32, None),
            KeyValue("tokenizer.ggml.tokens", ["a", "b", "ü"], ValueType.ARRAY, ValueType.STRING),
        ),
        metadata=gguf.Metadata(),
    )


def grouped_plan(source: Source) -> FilePlan:
    order = np.array([2, 0, 3, 1])
    tensors = list(plan_uniform(source, Q.Q8_0).tensors)
    up = tensors.pop()
    tensors[2] = dataclasses.replace(tensors[2], experts=order)
    for g, (run, quant_type) in enumerate(((order[:1], Q.Q5_0), (order[1:], Q.Q8_0))):
        tensors.append(TensorPlan(f"blk.0.ffn_up_exps.g{g}.weight", up.source, quant_type, run, None, g == 0))
    return FilePlan(tuple(tensors), {0: order})


def write(source: Source, plan: FilePlan, target: Target, extra_kv=None) -> list[Path]:
    return write_gguf(source, plan, encode_tensors(plan, 1, lambda *_: None), extra_kv or {}, target)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# names and key-values


def test_grouped_and_plain_files(tmp_path):
    source = random_source(tmp_path)
    extra = {"moe2gguf.layout": ("grouped", ValueType.STRING, None)}
    (path,) = write(source, grouped_plan(source), Target(tmp_path / "g.gguf"), extra)
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen3moe+grouped"  # stock llama.cpp must not take it for its own
    assert fields["qwen3moe.expert_count"] == N_EXPERTS
    assert fields["tokenizer.ggml.tokens"] == ["a", "b", "ü"]
    assert fields["moe2gguf.expert_order.0"] == [2, 0, 3, 1] and fields["moe2gguf.layout"] == "grouped"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert len([key for key in fields if key == "general.architecture"]) == 1
    assert [t.name for t in reader.tensors] == [t.name for t in grouped_plan(source).tensors]
    weight_ENK = source.tensor("blk.0.ffn_up_exps.weight").load()
    for name, experts, quant_type in (("g0", [2], Q.Q5_0), ("g1", [0, 3, 1], Q.Q8_0)):
        tensor = next(t for t in reader.tensors if f".{name}." in t.name)
        assert tensor.shape.tolist() == [HIDDEN, 32, len(experts)] and tensor.tensor_type == quant_type
        decoded = gguf.dequantize(tensor.data, quant_type)
        # a step of Q5_0 is a 16th of a block's largest weight
        assert np.abs(decoded - weight_ENK[experts]).max() < np.abs(weight_ENK).max() / 16

    (plain,) = write(source, plan_uniform(source, Q.Q8_0), Target(tmp_path / "p.gguf"))
    fields = {key: field.contents() for key, field in gguf.GGUFReader(plain).fields.items()}
    assert fields["general.architecture"] == "qwen3moe"
    assert not [key for key in fields if key.startswith("moe2gguf.expert_order")]


def test_file_type_is_of_the_most_bytes(tmp_path):
    source = random_source(tmp_path)
    names = {
        Q.F32: "ALL_F32",
        Q.BF16: "MOSTLY_BF16",
        Q.IQ2_XXS: "MOSTLY_IQ2_XXS",
        Q.Q4_K: "MOSTLY_Q4_K_M",
        Q.Q6_K: "MOSTLY_Q6_K",
        Q.Q2_K: "MOSTLY_Q2_K",
        Q.Q5_1: "MOSTLY_Q5_1",
        Q.Q8_K: "GUESSED",  # nothing is named after it
    }
    small, large = source.tensor("blk.0.attn_norm.weight"), SourceTensor("m", (512, 256), True, lambda: np.empty(0))
    for quant_type, name in names.items():
        plan = FilePlan((TensorPlan("n", small, Q.F32, None), TensorPlan("m", large, quant_type, None)), {})
        assert file_type(plan) == gguf.LlamaFileType[name]


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 8, 31])
def test_file_bytes_are_exact(tmp_path, n_tokens):
    """Whatever the length of the header, which is padded to 32 bytes before the first tensor."""
    source = random_source(tmp_path)
    extra = {"moe2gguf.recipe": ("x" * n_tokens, ValueType.STRING, None)}
    for plan in (grouped_plan(source), plan_uniform(source, Q.Q8_0), plan_uniform(source, Q.F32)):
        (path,) = write(source, plan, Target(tmp_path / "f.gguf", overwrite=True), extra)
        assert file_bytes(source, plan, extra) == path.stat().st_size


def test_a_second_run_writes_the_same_bytes(tmp_path):
    source = random_source(tmp_path)
    files = [write(source, grouped_plan(source), Target(tmp_path / f"{n}.gguf"))[0] for n in "ab"]
    assert sha256(files[0]) == sha256(files[1])


# conversions


def test_conversions_are_reproducible(converted, small_calibration, tmp_path):
    """From the statistics of a former run, in another folder, on another number of threads."""
    done = converted("qwen3_moe")
    for layout, result in done.results.items():
        with cheap_measurements():
            again = convert(
                done.folder,
                tmp_path / f"{layout}.gguf",
                bits=3.6,
                layout=layout,
                calibration=small_calibration,
                quantizer=quantizer_of(layout),
                work_folder=done.work,
                n_threads=1,
            )
        assert again.allocation == result.allocation
        assert sha256(again.path) == sha256(result.path)


def test_provenance(converted, small_text):
    done = converted("qwen3_moe")
    stats = load_stats(done.work / "stats.safetensors")
    for layout, result in done.results.items():
        fields = {key: field.contents() for key, field in gguf.GGUFReader(result.path).fields.items()}
        assert fields["moe2gguf.layout"] == layout
        assert fields["moe2gguf.source.sha256"] == stats.source_sha256
        assert fields["moe2gguf.calibration.digest"] == stats.digest
        assert fields["moe2gguf.calibration.tokens"] == stats.n_tokens == 4 * 32
        assert fields["moe2gguf.kld.predicted"] == pytest.approx(result.allocation.predicted_kl, rel=1e-6)
        assert fields["quantize.imatrix.dataset"] == small_text.name
        recipe = json.loads(fields["moe2gguf.recipe"])
        assert recipe["budget"] == "3.6 bits per weight" and recipe["layout"] == layout


@pytest.mark.parametrize("layout", ["grouped", "stock"])
def test_size_is_kept_and_used(converted, tmp_path, layout):
    done = converted("qwen3_moe")
    source, stats = open_source(done.folder), load_stats(done.work / "stats.safetensors")
    table = cost_table(source, stats, layout=layout)
    header = file_bytes(source, FilePlan((), {}), {})
    low, high = (int(b * source.n_params / 8) + header for b in (3.0, 6.0))
    for size_bytes in (low, low + 12345, (low + high) // 2, high):
        allocation, plan = fit_budget(source, stats, table, Budget(size_bytes=size_bytes), Choice(layout))
        assert plan is not None
        total = file_bytes(source, plan, provenance(source, stats, allocation))
        # within 0.5 %; in the stock layout, the steps of this small model are a whole projection's
        assert (0.995 if layout == "grouped" else 0.97) * size_bytes <= total <= size_bytes
    (path,) = write_allocation(source, stats, allocation, Target(tmp_path / "s.gguf"), Run(tmp_path, 2))
    assert path.stat().st_size == total


def test_size_up_to_the_largest(converted):
    """The header counts: a file of the largest types just fits, and a much larger size is out of reach."""
    done = converted("qwen3_moe")
    source, stats = open_source(done.folder), load_stats(done.work / "stats.safetensors")
    table = cost_table(source, stats)
    largest = table.fixed_bytes + int(table.bytes_UJ.max(1).sum())
    header = file_bytes(source, FilePlan((), {}), {})
    for statistics in (stats, None):
        allocation, _ = fit_budget(source, statistics, table, Budget(size_bytes=largest + header + 8192), Choice())
        assert allocation.tensor_bytes == largest
        with pytest.raises(BudgetError, match="above the largest"):
            fit_budget(source, statistics, table, Budget(size_bytes=int(1.02 * largest) + header), Choice())
        with pytest.raises(BudgetError, match="below the smallest"):
            fit_budget(source, statistics, table, Budget(size_bytes=header), Choice())


# shards


@pytest.mark.parametrize("limits", [{"split_max_bytes": 7000}, {"split_max_tensors": 2}])
def test_shards_hold_the_same(tmp_path, limits):
    source = random_source(tmp_path)
    plan = grouped_plan(source)
    (whole,) = write(source, plan, Target(tmp_path / "w.gguf"))
    shards = write(source, plan, Target(tmp_path / "s.gguf", **limits))
    assert [s.name for s in shards] == [f"s-{i + 1:05}-of-{len(shards):05}.gguf" for i in range(len(shards))]
    assert left_in(tmp_path) == sorted(["w.gguf", *(s.name for s in shards)]) and len(shards) > 1
    readers = [gguf.GGUFReader(shard) for shard in shards]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    expected = gguf.GGUFReader(whole).tensors
    assert [t.name for t in tensors] == [t.name for t in expected]
    for tensor, other in zip(tensors, expected, strict=True):
        assert tensor.tensor_type == other.tensor_type and tensor.data.tobytes() == other.data.tobytes()
    for number, reader in enumerate(readers):
        assert reader.fields["split.no"].contents() == number
        assert reader.fields["split.count"].contents() == len(shards)
        assert reader.fields["split.tensors.count"].contents() == len(expected)
        if "split_max_bytes" in limits:
            assert sum(int(t.n_bytes) for t in reader.tensors) <= 7000
        else:
            assert len(reader.tensors) <= 2
    assert readers[0].fields["general.architecture"].contents() == "qwen3moe+grouped"


def test_shards_load(converted, tmp_path):
    """The runtime finds the other shards by name, and their logits are those of the whole file."""
    from tests.logits import llama_logits

    done = converted("qwen3_moe")
    source, stats = open_source(done.folder), load_stats(done.work / "stats.safetensors")
    result = done.results["grouped"]
    target = Target(tmp_path / "s.gguf", split_max_bytes=300_000)
    with cheap_measurements():
        shards = write_allocation(source, stats, result.allocation, target, Run(tmp_path, 2))
    assert len(shards) >= 3
    tokens = list(range(1, 30))
    assert np.array_equal(llama_logits(shards[0], tokens), llama_logits(result.path, tokens))


def test_one_shard_is_a_plain_file(tmp_path):
    source = random_source(tmp_path)
    (path,) = write(source, grouped_plan(source), Target(tmp_path / "s.gguf", split_max_tensors=100))
    assert path.name == "s.gguf" and "split.no" not in gguf.GGUFReader(path).fields


# targets


@pytest.mark.parametrize("stem", ["model", "model [v1.0] (MQ3)*"])
def test_existing_files_are_kept(tmp_path, stem):
    source, name = random_source(tmp_path), f"{stem}.gguf"
    plan = grouped_plan(source)
    shards = write(source, plan, Target(tmp_path / name, split_max_tensors=2))
    with pytest.raises(OutputError, match=r"-00001-of-00003\.gguf exists; pass --force"):
        check_target(Target(tmp_path / name), 0)
    # forced, a whole file takes the place of all shards, and shards that of the file and of other shards
    for limit, n_files in ((0, 1), (3, 2), (2, 3), (0, 1)):
        target = Target(tmp_path / name, split_max_tensors=limit, overwrite=True)
        check_target(target, 0)
        files = write(source, plan, target)
        assert left_in(tmp_path) == sorted(file.name for file in files) and len(files) == n_files
    with pytest.raises(OutputError, match=r"\.gguf exists; pass --force"):
        check_target(Target(tmp_path / name), 0)
    assert len(shards) == 3


def test_forcing_spares_other_models(tmp_path):
    """Names that merely begin alike, and the shards of another model."""
    source = random_source(tmp_path)
    others = ["model-2.gguf", "mode.gguf", "model-2-00001-of-00002.gguf", "model-00001-of-00002.safetensors", "model"]
    for other in others:
        (tmp_path / other).write_text("theirs")
    write(source, grouped_plan(source), Target(tmp_path / "model.gguf", overwrite=True))
    assert left_in(tmp_path) == sorted([*others, "model.gguf"])
    assert all((tmp_path / other).read_text() == "theirs" for other in others)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"folder\.gguf is a folder; --outfile takes a file name"):
            check_target(Target(tmp_path / "folder.gguf", overwrite=overwrite), 0)


def test_folders_are_made_or_named(tmp_path):
    check_target(Target(tmp_path / "new" / "deep" / "m.gguf"), 0)
    assert (tmp_path / "new" / "deep").is_dir() and left_in(tmp_path / "new" / "deep") == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "m.gguf", tmp_path / "file" / "deep" / "m.gguf"):
        with pytest.raises(OutputError, match=r"cannot write to .*file"):
            check_target(Target(path), 0)


def test_a_full_disk_is_seen_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**9, 10**9 - 1000, 1000))
    check_target(Target(tmp_path / "m.gguf"), 1000)
    with pytest.raises(OutputError, match=r"has 1,000 bytes free, m\.gguf needs 1,001; make room"):
        check_target(Target(tmp_path / "m.gguf"), 1001)


@pytest.mark.parametrize("forced", [False, True])
def test_nothing_is_left_of_a_write_that_fails(tmp_path, forced):
    """A tensor that cannot be read, half way through: the old file stays as it was."""
    source = random_source(tmp_path)

    def fail() -> np.ndarray:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tensors = (*source.tensors[:-1], dataclasses.replace(source.tensors[-1], load=fail))
    damaged = dataclasses.replace(source, tensors=tensors)
    if forced:
        (tmp_path / "m.gguf").write_text("old")
    with pytest.raises(OutputError, match=r"writing .*m\.gguf failed: Input/output error; nothing was left"):
        write(damaged, grouped_plan(damaged), Target(tmp_path / "m.gguf", overwrite=forced))
    assert left_in(tmp_path) == (["m.gguf"] if forced else [])
    if forced:
        assert (tmp_path / "m.gguf").read_text() == "old"


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from moe2gguf.errors import OutputError
from moe2gguf.gguf_file import Target
from tests.test_gguf_file import grouped_plan, random_source, write
folder = Path(sys.argv[1])
source = random_source(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write(source, grouped_plan(source), Target(folder / "m.gguf", overwrite=True))
except OutputError as error:
    print(error)
"""


def test_the_disk_fills_up_on_the_way(tmp_path):
    """No more than 4 KiB to a file, by the operating system's own limit."""
    (tmp_path / "m.gguf").write_text("old")
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert "writing" in child.stdout and "m.gguf failed: File too large" in child.stdout
    assert left_in(tmp_path) == ["m.gguf"] and (tmp_path / "m.gguf").read_text() == "old"


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path):
    source = random_source(tmp_path)

    def missing() -> np.ndarray:
        raise FileNotFoundError(errno.ENOENT, "shard went away")

    damaged = dataclasses.replace(source, tensors=(dataclasses.replace(source.tensors[0], load=missing),))
    with pytest.raises(FileNotFoundError):
        write(damaged, plan_uniform(damaged, Q.F32), Target(tmp_path / "m.gguf"))
    assert left_in(tmp_path) == []


# names


def test_names(tmp_path):
    source = dataclasses.replace(
        random_source(tmp_path), metadata=gguf.Metadata(basename="Tiny", size_label="8x1M", finetune="Instruct")
    )
    assert outfile_for(source, None, Budget(bits=3.5)) == Path("Tiny-8x1M-Instruct-MQ3_5.gguf")
    size_bytes = int(2.5 * source.n_params / 8)
    assert outfile_for(source, None, Budget(size_bytes=size_bytes)) == Path("Tiny-8x1M-Instruct-MQ2_5.gguf")
    # as llama.cpp's converter has it
    assert outfile_for(source, tmp_path / "a-{ftype}.gguf", Budget(bits=2)) == tmp_path / "a-mq2.gguf"
    assert outfile_for(source, tmp_path / "a-{FTYPE}.gguf", Budget(bits=2)) == tmp_path / "a-MQ2.gguf"
    assert outfile_for(source, tmp_path / "a.gguf", Budget(bits=2)) == tmp_path / "a.gguf"


def test_float_file(tiny, tmp_path):
    """An unquantised base holds the checkpoint exactly."""
    folder = tiny("qwen3_moe")
    source = open_source(folder)
    path = write_float(folder, tmp_path / "base.gguf", ftype="bf16")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors.keys() == {tensor.name for tensor in source.tensors}
    for tensor in source.tensors:
        read = tensors[tensor.name]
        decoded = gguf.dequantize(read.data, Q(read.tensor_type)).reshape(tensor.shape)
        assert np.array_equal(decoded, tensor.load())
    assert Q(tensors["blk.0.ffn_up_exps.weight"].tensor_type) == Q.BF16
