import json
import logging
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers

from moe2gguf.errors import Moe2ggufError, RuntimeMissing
from moe2gguf.pipeline import outfile_for
from moe2gguf.runtime import find_runtime, tool
from moe2gguf.settings import Budget
from moe2gguf.work_folder import work_folder_for
from tests.tiny_configs import MODEL_TYPES
from tests.tiny_moe import CORPUS, make_tiny, with_head_ahead

try:
    find_runtime()
except RuntimeMissing as missing:
    pytest.skip(f"needs llama.cpp's converter: {missing}", allow_module_level=True)

import llama_cpp

from moe2gguf.source import Source, expert_axis, layer_of, open_source, resolve_model
from moe2gguf.source.checkpoint import repository_of
from moe2gguf.source.pre_tokenizer import DEEPSEEK3, GPT4O, LLAMA3, NAMES, QWEN2, TEKKEN, pre_tokenizer_name
from tests.dequantised import dequantised_checkpoint
from tests.logits import TABLE_NOISE, llama_logits, transformers_logits

# dimensions no K-quant block divides, experts narrower than the model, another number of experts
ODD = {"hidden": 192, "intermediate": 96, "n_experts": 6, "top_k": 3}


def write_gguf(source: Source, path: Path, *, native: bool = False) -> Path:
    """Everything as the converter says, weights as F32 or, if `native`, in the checkpoint's own type."""
    writer = gguf.GGUFWriter(path, source.arch)
    for pair in source.kv:
        if pair.key != "general.architecture":
            writer.add_key_value(pair.key, pair.value, pair.type, pair.sub_type)
    for tensor in source.tensors:
        if native and tensor.load_native is not None:
            writer.add_tensor(tensor.name, tensor.load_native(), raw_dtype=tensor.native_type)
        else:
            writer.add_tensor(tensor.name, tensor.load())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny") / "qwen3_moe")


@pytest.fixture
def damaged(qwen3: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(qwen3, tmp_path / "damaged")


# --- the way there and back, and the same logits ---


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        *((model_type, {}) for model_type in MODEL_TYPES),
        *((model_type, ODD) for model_type in MODEL_TYPES),
        ("gpt_oss", {"stored": "mxfp4"}),
        ("mixtral", {"dtype": torch.float16}),
        ("qwen3_moe", {"dtype": torch.float32}),
    ],
)
def test_llama_cpp_computes_what_transformers_does(model_type: str, options: dict, tmp_path: Path) -> None:
    folder = make_tiny(model_type, tmp_path / "model", **options)
    file = write_gguf(open_source(folder), tmp_path / "f32.gguf")
    restored = dequantised_checkpoint(file, folder, tmp_path / "restored")

    original, again = load_file(folder / "model.safetensors"), load_file(restored / "model.safetensors")
    assert "stored" in options or original.keys() == again.keys()
    for name in original.keys() & again.keys():
        assert torch.equal(original[name].float(), again[name]), name

    tokens = np.random.default_rng(0).integers(0, 300, 96).tolist()
    theirs, ours = transformers_logits(restored, tokens), llama_logits(file, tokens)
    # f32 sums in another order: 1e-5 was seen where logits spread over 2; a wrong expert moves them by 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TABLE_NOISE.get(model_type, 1e-4) * theirs.std())


def test_experts_are_numbered_as_in_the_checkpoint(tmp_path: Path) -> None:
    folder = make_tiny("mixtral", tmp_path)
    checkpoint, source = load_file(folder / "model.safetensors"), open_source(folder)
    for gguf_name, hf_name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        merged = source.tensor(f"blk.1.ffn_{gguf_name}_exps.weight").load()
        for expert in range(source.n_expert):
            one = checkpoint[f"model.layers.1.block_sparse_moe.experts.{expert}.{hf_name}.weight"]
            np.testing.assert_array_equal(merged[expert], one.float().numpy())


def test_reordered_and_grouped_experts_are_put_back(qwen3: Path, tmp_path: Path) -> None:
    source = open_source(qwen3)
    order = np.random.default_rng(3).permutation(source.n_expert)
    writer = gguf.GGUFWriter(tmp_path / "grouped.gguf", source.arch)
    writer.add_array("moe2gguf.expert_order.1", order.tolist())
    for tensor in source.tensors:
        value = tensor.load()
        if expert_axis(tensor.name) == 0 and layer_of(tensor.name) == 1:
            value = value[order]
            if "_exps." in tensor.name:
                for group, part in enumerate(np.split(value, [1, 4])):
                    name = tensor.name.replace(".weight", f".g{group}.weight")
                    writer.add_tensor(name, np.ascontiguousarray(part))
                continue
        writer.add_tensor(tensor.name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    restored = dequantised_checkpoint(tmp_path / "grouped.gguf", qwen3, tmp_path / "restored")
    again = load_file(restored / "model.safetensors")
    for name, weight in load_file(qwen3 / "model.safetensors").items():
        assert torch.equal(weight.float(), again[name]), name


# --- what a source says of itself ---


def test_the_bundled_model() -> None:
    source = open_source("demo")
    assert (source.arch, source.n_layer, source.n_expert, source.n_expert_used) == ("qwen3moe", 5, 16, 2)
    assert source.n_expert_groups == 1
    assert source.n_params == sum(w.numel() for w in load_file(source.path / "model.safetensors").values())
    kv = {pair.key: pair.value for pair in source.kv}
    assert kv["tokenizer.ggml.pre"] == "qwen2"
    assert kv["general.license"] == "mit"
    assert source.metadata.size_label == "16x4.1M"


def test_name_and_metadata_by_hand(qwen3: Path, tmp_path: Path) -> None:
    assert open_source(qwen3, model_name="Some Name").name == "Some Name"
    (tmp_path / "metadata.json").write_text(json.dumps({"general.author": "Somebody"}))
    source = open_source(qwen3, metadata_file=tmp_path / "metadata.json")
    assert source.metadata.author == "Somebody"
    assert "Somebody" in [pair.value for pair in source.kv if pair.key == "general.author"]
    with pytest.raises(Moe2ggufError, match=r"no\.json cannot be read: No such file"):
        open_source(qwen3, metadata_file=tmp_path / "no.json")


def test_routing_groups(tmp_path: Path) -> None:
    assert open_source(make_tiny("deepseek_v3", tmp_path)).n_expert_groups == 2


def test_shards_hold_the_same(qwen3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen3, tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for number, (name, weight) in enumerate(load_file(qwen3 / "model.safetensors").items()):
        shards.setdefault(f"model-0000{number % 3 + 1}-of-00003.safetensors", {})[name] = weight
    for file_name, tensors in shards.items():
        save_file(tensors, folder / file_name)
    weight_map = {name: file_name for file_name, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole = {tensor.name: tensor.load() for tensor in open_source(qwen3).tensors}
    sharded = {tensor.name: tensor.load() for tensor in open_source(folder).tensors}
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(sharded[name], value, err_msg=name)


def test_expert_axis_and_layer() -> None:
    assert expert_axis("blk.3.ffn_gate_up_exps.weight") == 0
    assert expert_axis("blk.3.ffn_down_exps.bias") == 0
    assert expert_axis("blk.3.ffn_down_exps.scale") == 0
    assert expert_axis("blk.3.ffn_gate_inp.weight") == 0
    assert expert_axis("blk.3.exp_probs_b.bias") == 0
    assert expert_axis("blk.3.ffn_gate_shexp.weight") is None
    assert expert_axis("blk.3.ffn_gate_inp_shexp.weight") is None
    assert expert_axis("output.weight") is None
    assert layer_of("blk.12.attn_q.weight") == 12
    assert layer_of("token_embd.weight") is None


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_quantisable_is_what_llama_quantize_quantises(model_type: str, tmp_path: Path) -> None:
    source = open_source(make_tiny(model_type, tmp_path / "model"))
    file = write_gguf(source, tmp_path / "f32.gguf")
    command = [str(tool("llama-quantize")), "--pure", str(file), str(tmp_path / "q8.gguf"), "Q8_0"]
    subprocess.run(command, check=True, capture_output=True)
    quantised = gguf.GGUFReader(tmp_path / "q8.gguf")
    found = {tensor.name: tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0 for tensor in quantised.tensors}
    assert found == {tensor.name: tensor.quantisable for tensor in source.tensors}


def test_mxfp4_is_kept_and_decoded(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = make_tiny("gpt_oss", tmp_path / "model", stored="mxfp4")
    packed, source = load_file(folder / "model.safetensors"), open_source(folder)
    experts = "model.layers.0.mlp.experts"
    gate_up_EKN = convert_moe_packed_tensors(
        packed[f"{experts}.gate_up_proj_blocks"],
        packed[f"{experts}.gate_up_proj_scales"],
        dtype=torch.float32,
    )
    gate = source.tensor("blk.0.ffn_gate_exps.weight")
    assert gate.native_type == gguf.GGMLQuantizationType.MXFP4
    assert gate.load_native is not None
    np.testing.assert_array_equal(gate.load(), gate_up_EKN[:, :, ::2].transpose(1, 2).numpy())

    tokens = list(range(64))
    as_f32 = llama_logits(write_gguf(source, tmp_path / "f32.gguf"), tokens)
    as_mxfp4 = llama_logits(write_gguf(source, tmp_path / "mxfp4.gguf", native=True), tokens)
    # llama.cpp rounds activations to 8 bits before it multiplies by MXFP4
    assert np.corrcoef(as_f32.ravel(), as_mxfp4.ravel())[0, 1] > 0.995


def test_fp8_sources_are_dequantised(qwen3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen3, tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    scale = torch.tensor([[0.25, 2.0]])
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    expected = tensors[name].float() * scale.repeat_interleave(128, dim=1)
    np.testing.assert_array_equal(open_source(folder).tensor("blk.0.attn_q.weight").load(), expected.numpy())


# --- laziness ---

MEMORY_SCRIPT = """
import json, sys
from pathlib import Path
from moe2gguf.source import open_source

def memory_kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

open_source("demo")  # imports, caches
before = memory_kib("VmRSS")
source = open_source(sys.argv[1])
opened = memory_kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
tensor = source.tensor("blk.0.ffn_down_exps.weight")
for _ in range(2):
    value = tensor.load()
    n_kib = value.nbytes // 1024
    del value
print(json.dumps(dict(opened=opened - before, peak=memory_kib("VmHWM") - opened,
                      kept=memory_kib("VmRSS") - opened, tensor=n_kib)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by Linux's /proc")
def test_opening_reads_no_weights_and_loading_keeps_none(tmp_path: Path) -> None:
    folder = make_tiny("mixtral", tmp_path / "sparse", hidden=64, intermediate=64)
    hidden, intermediate, n_experts = 2048, 4096, 8
    edit_json(folder / "config.json", hidden_size=hidden, intermediate_size=intermediate, head_dim=hidden // 4)
    shapes = {
        name: [*weight.shape[:-1], weight.shape[-1] * hidden // 64]
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    for name, shape in shapes.items():
        if ".experts." in name:
            shape[:] = [hidden, intermediate] if ".w2." in name else [intermediate, hidden]
        elif "_proj" in name:
            shape[0] *= hidden // 64
    write_sparse_safetensors(folder / "model.safetensors", shapes)  # 1.6 GB that take no room on disk

    finished = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(folder)], capture_output=True, text=True, check=True
    )
    kib = json.loads(finished.stdout.splitlines()[-1])
    assert kib["tensor"] == n_experts * hidden * intermediate * 4 // 1024
    assert kib["opened"] < 20_000  # tokens and header
    assert kib["kept"] < 20_000
    # the tensor, and one expert of it as it is read: bf16 and f32
    assert kib["peak"] < kib["tensor"] * (1 + 1.5 / n_experts) + 20_000


def test_each_load_is_a_new_array(qwen3: Path) -> None:
    for tensor in open_source(qwen3).tensors:
        first = tensor.load()
        assert first.shape == tensor.shape
        assert first.dtype == np.float32
        assert first.flags.c_contiguous
        kept = first.copy()
        first[...] = -1.0
        np.testing.assert_array_equal(tensor.load(), kept, err_msg=tensor.name)


def write_sparse_safetensors(file: Path, shapes: dict[str, list[int]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


# --- pre-tokenizers ---


def split(regex: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(regex), behavior, invert)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


def regexes_of(name: str) -> list[str]:
    """The regexes in our table; the digits that end DeepSeek's come from `tokenizers` in its files."""
    return next(list(steps) for steps, names in NAMES.items() if name in names)


FAMILIES: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": [GPT2_WORDS],
    "starcoder": [DIGITS, GPT2_WORDS],
    "falcon": [
        pre_tokenizers.Punctuation("contiguous"),
        GPT2_WORDS,
        pre_tokenizers.Digits(individual_digits=False),
        split("[0-9][0-9][0-9]"),
    ],
    "dbrx": [split(LLAMA3), BYTES],
    "qwen2": [split(QWEN2), BYTES],
    "qwen35": [split(regexes_of("qwen35")[0]), BYTES],
    "gpt-4o": [split(GPT4O, "removed", invert=True), BYTES],
    "tekken": [split(TEKKEN), BYTES],
    "deepseek-v3": [*(split(regex.replace(r"\r", "\r").replace(r"\n", "\n")) for regex in DEEPSEEK3), BYTES],
    "deepseek-coder": [*(split(regex) for regex in regexes_of("deepseek-coder")[:-1]), DIGITS, BYTES],
    "deepseek-llm": [*(split(regex) for regex in regexes_of("deepseek-llm")[:-1]), DIGITS, BYTES],
}
TEXT = (
    "It's 1234567 o'clock, SHE'LL say: don't!\n\n  def f(x):\n\treturn x**2 + 0.5  # naïve café\r\n"
    "我们在 2024 年 кот Straße ... \u3000“quoted”   trailing  \n\n\n a_b CamelCaseWord 𝔘𝔫𝔦 🙂🙂 日本語テスト"
)


def with_pre_tokenizer(folder: Path, parts: list[pre_tokenizers.PreTokenizer], **model: bool) -> dict:
    """Exchanges the pre-tokenizer of the folder's tokenizer.json, which is also returned."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= model
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_tokenises_as_the_checkpoint(name: str, damaged: Path, tmp_path: Path) -> None:
    content = with_pre_tokenizer(damaged, FAMILIES[name])
    assert pre_tokenizer_name(content) == name
    model = llama_cpp.Llama(
        str(write_gguf(open_source(damaged), tmp_path / "vocab.gguf")), vocab_only=True, verbose=False
    )
    tokenizer = Tokenizer.from_file(str(damaged / "tokenizer.json"))
    for text in (TEXT, *CORPUS):
        expected = tokenizer.encode(text).ids
        assert model.tokenize(text.encode(), add_bos=False) == expected, tokenizer.encode(text).tokens
    model.close()


def test_every_known_family_is_tested() -> None:
    assert set(FAMILIES) == {names[0] or names[1] for names in NAMES.values()}


def test_ignored_merges_choose_between_names(damaged: Path) -> None:
    assert pre_tokenizer_name(with_pre_tokenizer(damaged, FAMILIES["dbrx"], ignore_merges=True)) == "llama-bpe"


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},  # llama.cpp would not do it
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": QWEN2 + "|x"}, "behavior": "Isolated"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "MergedWithNext"}},
        {"model": {"type": "WordPiece"}},
    ],
)
def test_what_llama_cpp_does_not_split_alike_is_not_guessed(change: dict, qwen3: Path) -> None:
    content = json.loads((qwen3 / "tokenizer.json").read_text())
    assert pre_tokenizer_name(content) == "qwen2"
    assert pre_tokenizer_name(content | change) is None


def test_pre_tokenizer_by_hand(damaged: Path) -> None:
    with_pre_tokenizer(damaged, [split("[ab]+"), BYTES])
    with pytest.raises(Moe2ggufError, match=r"--pre-tokenizer NAME, out of .*llama-bpe.*qwen2"):
        open_source(damaged)
    source = open_source(damaged, pre_tokenizer="gpt-2")
    assert {pair.key: pair.value for pair in source.kv}["tokenizer.ggml.pre"] == "gpt-2"
    with pytest.raises(Moe2ggufError, match=r"qwen3 is not a pre-tokenizer of llama.cpp; name the one"):
        open_source(damaged, pre_tokenizer="qwen3")


# --- what users get wrong ---


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(folder: Path, n_bytes: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:n_bytes])


def index(folder: Path, **file_of: str) -> Path:
    names = load_file(folder / "model.safetensors")
    weight_map = {name: file_of.get(name.split(".")[0], "model.safetensors") for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def remove_expert(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json; give the folder"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "no architecture": (lambda f: edit_json(f / "config.json", architectures=[]), "names no architecture"),
    "unknown architecture": (
        lambda f: edit_json(f / "config.json", architectures=["Qwen3MoForCausalLM"]),
        r"is a Qwen3MoForCausalLM, which .* \(close: Qwen3MoeForCausalLM.*--print-supported-models",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "has no tokenizer .*tokenizer.json",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model\*\.safetensors"),
    "missing shard": (
        lambda f: index(f, lm_head="model-2.safetensors"),
        r"model-2\.safetensors is missing, though .*index\.json names it",
    ),
    "shard without its tensors": (
        lambda f: remove_expert(index(f)),
        r"model\.safetensors lacks model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight and 0 more",
    ),
    "missing expert": (remove_expert, "cannot read .*Unprocessed experts"),
    "empty file": (lambda f: cut(f, 0), "is cut short: 0 bytes found, its header alone needs 8"),
    "cut in the header": (lambda f: cut(f, 100), "is cut short: 100 bytes found, its header alone needs"),
    "cut in the data": (lambda f: cut(f, -1), r"is cut short: (\d+) bytes found, (\d+) needed"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"\xff" * 4),
        "header is corrupt",
    ),
    "NVFP4": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        "is quantised to NVFP4",
    ),
    "unknown quantisation": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "hqq"}),
        "Quant method is not yet supported: 'hqq'",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_in_one_sentence(kind: str, damaged: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(damaged)
    with pytest.raises(Moe2ggufError, match=message) as caught:
        open_source(damaged)
    assert str(damaged) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_found_on_loading(bad: float, damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.experts.5.up_proj.weight"][7, 9] = bad
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    source = open_source(damaged)
    source.tensor("blk.0.ffn_up_exps.weight").load()
    with pytest.raises(Moe2ggufError, match=r"blk\.1\.ffn_up_exps\.weight of .* holds 1 weights that are NaN"):
        source.tensor("blk.1.ffn_up_exps.weight").load()


def test_dense_models_are_refused(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = make_tiny("qwen3_moe", tmp_path / "dense")
    config = Qwen3Config(vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=16)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    with pytest.raises(Moe2ggufError, match="is a dense qwen3 model without experts"):
        open_source(folder)


def test_the_folder_at_hand_has_a_name(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(qwen3)
    assert resolve_model(".") == qwen3 and resolve_model(f"../{qwen3.name}/") == qwen3


def test_models_that_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(Moe2ggufError, match="is a file, not a checkpoint folder"):
        resolve_model(tmp_path / "model.safetensors")
    with pytest.raises(Moe2ggufError, match="neither a folder nor a Hugging Face id of the form owner/name"):
        resolve_model(tmp_path / "nothing")
    # nothing listens there: as on a machine without network
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Moe2ggufError, match="owner/name is not a folder here, and cannot be downloaded"):
        resolve_model("owner/name")


def test_a_snapshot_of_the_hub_has_its_models_name(qwen3: Path, tmp_path: Path) -> None:
    """Not the commit's, which its folder is called after: in the file, its name, and the folder beside it."""
    commit = "ad44e777bcd18fa416d9da3bd8f70d33ebb85d39"
    snapshot = tmp_path / "models--Qwen--Qwen3-30B-A3B/snapshots" / commit
    shutil.copytree(qwen3, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (snapshot / "generation_config.json").write_text('{"top_k": 20}')
    source = open_source(snapshot)
    values = {pair.key: pair.value for pair in source.kv}
    assert source.name == "Qwen3 30B A3B" and values["general.license"] == "apache-2.0"
    assert values["general.sampling.top_k"] == 20
    assert commit[:8].lower() not in str(values).lower()
    assert repository_of(snapshot) == "Qwen/Qwen3-30B-A3B" and repository_of(qwen3) is None
    assert outfile_for(source, None, Budget(bits=2.54)).name.startswith("Qwen3-")
    assert work_folder_for(source, Path("out/x.gguf")) == Path("out/Qwen3-30B-A3B.moe2gguf")
    # read when everything is long opened
    assert np.isfinite(source.tensor("blk.0.ffn_up_exps.weight").load()).all()


def test_gating_by_another_name(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("dots1"), tmp_path / "dots")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scoring_func": "noaux_tc"}))
    values = {pair.key: pair.value for pair in open_source(folder).kv}
    assert values["dots1.expert_gating_func"] == 2  # sigmoid


def test_an_assertion_of_the_converter_is_shown(qwen3: Path, tmp_path: Path) -> None:
    """Its text, where it says nothing itself."""
    folder = shutil.copytree(qwen3, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(Moe2ggufError, match=r"AssertionError: assert max\(tokenizer\.vocab"):
        open_source(folder)


def test_nothing_is_logged_unless_asked(qwen3: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_source(qwen3)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_what_is_asked_for_is_logged(qwen3: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        open_source(qwen3)
    assert any("blk.0.attn_q.weight" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("model_type", ["glm4_moe", "qwen3_next"])
def test_heads_that_predict_further_tokens_are_left_out(model_type: str, tmp_path: Path) -> None:
    """Published checkpoints have them as one more layer, or beside the model's; transformers does not run them."""
    folder = make_tiny(model_type, tmp_path / "without")
    wanted = open_source(folder)
    found = open_source(with_head_ahead(folder, tmp_path / "with"))
    assert (found.n_layer, found.n_params) == (wanted.n_layer, wanted.n_params)
    assert [tensor.name for tensor in found.tensors] == [tensor.name for tensor in wanted.tensors]
    assert not any("nextn" in pair.key for pair in found.kv)
