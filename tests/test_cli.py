import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe2gguf.alone import alone_in
from moe2gguf.cli import _Size, main
from moe2gguf.costs import CANDIDATES
from moe2gguf.errors import Moe2ggufError
from moe2gguf.pipeline import outfile_for
from moe2gguf.record import load_record
from moe2gguf.settings import Budget
from moe2gguf.source import open_source
from moe2gguf.text import load_tokenizer
from tests.conftest import cheap_measurements
from tests.tiny_moe import make_tiny

REPOSITORY = Path(__file__).parents[1]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_sentence(result: Result, pattern: str, exit_code: int = 1) -> None:
    """A mistake: one line on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == exit_code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("moe2gguf: ") and re.search(pattern, last), result.stderr
    assert "Traceback" not in result.stderr
    # what comes before are progress and notes
    assert sum(line.startswith("moe2gguf: ") for line in result.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def done(converted):
    return converted("qwen3_moe")


@pytest.fixture
def damaged(tiny, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(tiny("qwen3_moe"), tmp_path / "damaged")


def request(done, small_text) -> list[object]:
    """Options with which the statistics at hand are those asked for."""
    return [
        *("--text", small_text, "--sequences", 4, "--length", 32, "--probe-tokens", 64),
        *("--work", done.work),
    ]


# help and usage

COMMANDS = (
    *("convert", "prune", "calibrate", "allocate", "quantize", "verify", "inspect"),
    *("card", "demo", "bench", "report", "runtime"),
)


def test_the_commands_are_these():
    assert {*main.commands} == {*COMMANDS}


@pytest.mark.parametrize("arguments", [[], *([c] for c in COMMANDS), *(["runtime", c] for c in ("status", "install"))])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(arguments, option):
    result = run(*arguments, option)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.startswith("Usage:") and len(result.stdout.splitlines()) > 4


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_every_option_is_explained(command):
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option) and "--outfile" not in parameter.opts:
            assert parameter.help or parameter.name in ("bits", "folder"), parameter.name


def test_version():
    from moe2gguf import __version__

    assert run("--version").stdout == f"moe2gguf, version {__version__}\n"


HEAVY = ("torch", "transformers", "scipy", "matplotlib", "llama_cpp", "gguf", "huggingface_hub", "safetensors")


def test_help_imports_nothing_heavy():
    """--help must answer at once: torch and transformers alone take seconds."""
    code = (
        "import sys; from click.testing import CliRunner; from moe2gguf.cli import main\n"
        "assert CliRunner().invoke(main, ['convert', '--help']).exit_code == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["convert"], "Missing argument 'MODEL'"),
        (["convert", "x"], "give either --bits or --size"),
        (["convert", "x", "--bits", "3", "--size", "1G"], "give either --bits or --size"),
        (["convert", "x", "--bits", "0"], "0.0 is not in the range x>0"),
        (["convert", "x", "--bits", "many"], "'many' is not a valid float"),
        (["convert", "x", "--size", "12 apples"], "'12 apples' is not a size like 12GiB"),
        (["convert", "x", "--bits", "3", "--types", "Q9_K"], "'Q9_K' is not one of IQ1_M, IQ2_XXS"),
        (["convert", "x", "--bits", "3", "--types", "Q4_0"], "'Q4_0' is not one of"),  # a type, but no candidate
        (["convert", "x", "--bits", "3", "--tensor-type", "attn"], "'attn' is not REGEX=TYPE"),
        (["convert", "x", "--bits", "3", "--tensor-type", "(=Q4_K"], "'(' is not a regular expression"),
        (["convert", "x", "--bits", "3", "--tensor-type", "a=b=Q5"], "'Q5' is not one of"),
        (["convert", "x", "--bits", "3", "--layout", "fancy"], "'fancy' is not one of 'grouped', 'stock'"),
        (["convert", "x", "--bits", "3", "--max-groups", "8"], "8 is not in the range 1<=x<=7"),
        (["convert", "x", "--bits", "3", "--text", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["convert", "x", "--bits", "3", "--nonsense"], "No such option"),
        (["calibrate", "x", "--sequences", "0"], "0 is not in the range x>=2"),
        (["calibrate", "x", "--bits", "3"], "No such option"),
        (["allocate", "x", "--bits", "3"], "Missing option '--stats'"),
        (["quantize", "x", "--stats", __file__], "Missing option '--allocation'"),
        (["verify", "x.gguf"], "Missing option '--against'"),
        (["unheard-of"], "No such command"),
    ],
)
def test_usage_errors_exit_with_2(arguments, text):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert text in result.stderr and "Traceback" not in result.stderr


def test_a_gpu_without_room(tiny, tmp_path, monkeypatch):
    """torch says it in many lines; other errors of its kind are no mistake of the user."""

    def fail(error):
        def raise_it(*_, **__):
            raise error

        monkeypatch.setattr("moe2gguf.pipeline.calibrated", raise_it)
        return run("calibrate", tiny("qwen3_moe"), "--device", "cpu", "--work", tmp_path)

    assert_sentence(
        fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation")),
        r"memory does not hold it \(CUDA out of memory. Tried to allocate 2 GiB.\); take --dtype bf16.*--device cpu",
    )
    assert isinstance(fail(RuntimeError("a bug")).exception, RuntimeError)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4500000000", 4_500_000_000),
        ("12GiB", 12 * 2**30),
        ("4.5G", 4_500_000_000),
        ("1.5GB", 1_500_000_000),
        ("700M", 700_000_000),
        ("512 KiB", 512 * 1024),
        ("0", 0),
        ("1g", None),
        ("-1", None),
        ("1T", None),
        ("", None),
        ("1e9", None),
    ],
)
def test_sizes(text, n_bytes):
    if n_bytes is None:
        with pytest.raises(click.BadParameter):
            _Size().convert(text, None, None)
    else:
        assert _Size().convert(text, None, None) == n_bytes


# the stages


def test_stages_make_the_same_file(done, small_text, tmp_path):
    """calibrate, allocate, quantize one by one, convert in one go, and the Python call."""
    calibration = request(done, small_text)[:-2]
    with cheap_measurements():
        result = run("calibrate", done.folder, *calibration, "--work", tmp_path / "work")
    assert result.exit_code == 0, result.output
    stats = tmp_path / "work" / "stats.safetensors"
    assert result.stdout == f"{stats}\n"
    assert sha256(stats) == sha256(done.work / "stats.safetensors")
    # the text was saved as it was used
    assert (tmp_path / "work" / "calibration.txt").read_text() == (done.work / "calibration.txt").read_text()

    allocation = tmp_path / "a.json"
    result = run("allocate", done.folder, "--stats", stats, "--bits", 3.6, "--outfile", allocation)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"3\.(5\d\d|600) bits per weight, predicted KL \d\.\d{4}: .*a\.json\n", result.stdout)
    outfile = tmp_path / "q.gguf"
    with cheap_measurements():
        result = run("quantize", done.folder, "--stats", stats, "--allocation", allocation, "--outfile", outfile)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{outfile}  {outfile.stat().st_size:,} bytes\n"

    whole = tmp_path / "c.gguf"
    with cheap_measurements():
        result = run("convert", done.folder, "--bits", 3.6, *request(done, small_text), "--outfile", whole)
    assert result.exit_code == 0, result.output
    assert "using the statistics in" in result.stderr and "layer 1/2: statistics" not in result.stderr
    assert f"{whole}  {whole.stat().st_size:,} bytes" in result.stdout
    assert sha256(outfile) == sha256(whole) == sha256(done.results["grouped"].path)

    result = run("verify", whole, "--against", done.folder)
    assert result.exit_code == 0, result.output
    result = run("inspect", whole)
    assert result.exit_code == 0 and "moe2gguf" in result.stdout


def test_options_reach_the_file(done, small_text, tmp_path):
    import gguf

    result = run(
        *("convert", done.folder, "--size", "1300K", "--layout", "stock", *request(done, small_text)),
        *("--outfile", tmp_path / "o-{ftype}.gguf", "--types", "q2_k", "--types", "IQ3_S", "--types", "Q8_0"),
        *("--tensor-type", "attn_(q|k)=Q6_K", "--output-tensor-type", "Q5_K", "--token-embedding-type", "IQ3_S"),
        *("--split-max-tensors", 10, "--model-name", "Renamed", "--threads", 1),
    )
    assert result.exit_code == 0, result.output
    shards = sorted(tmp_path.glob("o-mq*.gguf"))
    assert len(shards) > 1 and all(str(shard) in result.stdout for shard in shards)
    readers = [gguf.GGUFReader(shard) for shard in shards]
    types = {tensor.name: tensor.tensor_type.name for reader in readers for tensor in reader.tensors}
    assert types["output.weight"] == "Q5_K" and types["token_embd.weight"] == "IQ3_S"
    assert {types[f"blk.{n}.attn_{p}.weight"] for n in (0, 1) for p in "qk"} == {"Q6_K"}
    experts = {name: t for name, t in types.items() if "_exps" in name}
    assert len(experts) == 6 and {*experts.values()} <= {"Q2_K", "IQ3_S", "Q8_0"}
    fields = {key: field.contents() for key, field in readers[0].fields.items()}
    assert fields["general.architecture"] == "qwen3moe" and fields["general.name"] == "Renamed"
    recipe = json.loads(fields["moe2gguf.recipe"])
    assert recipe["budget"] == "1,300,000 bytes" and recipe["types"] == ["Q2_K", "IQ3_S", "Q8_0"]
    assert ["attn_(q|k)", "Q6_K"] in recipe["overrides"] and recipe["layout"] == "stock"
    # shards have headers of their own; the size is that of a whole file
    assert sum(shard.stat().st_size for shard in shards) < 1_300_000 + 8192 * len(shards)


def test_dry_run_before_and_after_calibration(done, small_text, tmp_path):
    before = run("convert", done.folder, "--bits", 3.6, "--work", tmp_path / "w", "--dry-run")
    assert before.exit_code == 0, before.output
    assert "provisional" in before.stdout and "expert" in before.stdout
    assert not (tmp_path / "w").exists()
    after = run(
        *("convert", done.folder, "--bits", 3.6, *request(done, small_text), "--dry-run"),
        *("--outfile", tmp_path / "d.gguf"),
    )
    assert after.exit_code == 0, after.output
    kl = done.results["grouped"].allocation.predicted_kl
    assert f"mean KL divergence {kl:.4f}" in after.stdout and "provisional" not in after.stdout
    assert list(tmp_path.iterdir()) == []


def test_begin_anew(tiny, small_text, tmp_path):
    few = ["--sequences", 4, "--length", 32, "--probe-tokens", 64]
    command = ["calibrate", tiny("qwen3_moe"), "--text", small_text, *few, "--work", tmp_path]
    with cheap_measurements():
        run(*command)
        (tmp_path / "experts-0123456789abcdef").mkdir()
        (tmp_path / "pruned-4-of-6" / "model").mkdir(parents=True)
        users = ("experts-data", "pruned-olmoe", "calibrating-x")
        for name in users:
            (tmp_path / name).mkdir()
        resumed = run(*command, "--resume")
        with alone_in(tmp_path / "experts-0123456789abcdef"):  # another run quantises
            refused = run(*command, "--no-resume")
        assert (tmp_path / "stats.safetensors").exists()
        anew = run(*command, "--no-resume")
    assert_sentence(refused, "another run works in .*experts-0123456789abcdef")
    assert "using the statistics in" in resumed.stderr and "using the statistics in" not in anew.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"calibration.txt", "stats.safetensors", *users}


def test_the_plan_of_beginning_anew(done, small_text):
    command = ["convert", done.folder, "--bits", 3.6, *request(done, small_text), "--dry-run"]
    with cheap_measurements():
        resumed, anew = run(*command), run(*command, "--no-resume")
    assert "provisional" not in resumed.stdout and "provisional" in anew.stdout
    assert (done.work / "stats.safetensors").exists()


# mistakes


@pytest.mark.parametrize("command", [["convert", "x", "--bits", 3], ["calibrate", "x"]])
@pytest.mark.parametrize("writer", ["sample", "ebss"])
def test_a_text_and_how_to_write_one(command, writer, small_text):
    result = run(*command, "--text", small_text, "--calib", writer)
    assert result.exit_code == 2 and "--calib is how the model writes its own text, and --text is" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["report", "{record}"], ["inspect", "{file}"], ["convert", "{model}", "--bits", "3.6", "--dry-run"]]
)
def test_nobody_reads_the_output(arguments, done, tmp_path):
    """As before `| head -1`, which has gone: it ends without a word, unlike after a mistake."""
    record = shutil.copy(REPOSITORY / "benchmarks" / "demo.json", tmp_path)
    words = [a.format(record=record, file=done.results["grouped"].path, model=done.folder) for a in arguments]
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.run(
        [sys.executable, "-m", "moe2gguf.cli", *words], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    os.close(writer)
    assert child.returncode != 0 and not re.search("moe2gguf:|pipe|Traceback|ignored", child.stderr, re.I), child.stderr


def test_budgets_out_of_reach(done, small_text, tmp_path):
    common = [*request(done, small_text), "--outfile", tmp_path / "x.gguf"]
    for arguments, text in (
        (["--bits", 1], r"^moe2gguf: 1\.00 bits per weight .* is below the smallest allocation, \d"),
        (["--bits", 12], r"^moe2gguf: 12\.00 bits .* is above the largest allocation"),
        (["--size", "300K"], r"below the smallest"),
        (["--size", "1G"], r"above the largest"),
        (["--bits", 3, "--types", "Q8_0"], r"below the smallest.*--types"),
    ):
        assert_sentence(run("convert", done.folder, *arguments, *common), text)
        assert_sentence(run("convert", done.folder, *arguments, *common, "--dry-run"), text)
    assert list(tmp_path.iterdir()) == []


def test_a_pin_that_matches_nothing(done, small_text, tmp_path):
    result = run(
        *("convert", done.folder, "--bits", 3.6, "--tensor-type", "atn_q=Q6_K", *request(done, small_text)),
        *("--outfile", tmp_path / "x.gguf"),
    )
    assert_sentence(result, r"no matrix whose type can be chosen has a name that 'atn_q' matches")


def test_existing_output_is_found_before_the_work(tiny, small_text, tmp_path):
    (tmp_path / "x.gguf").write_text("old")
    common = ["--bits", 3.6, "--text", small_text, "--outfile"]
    assert_sentence(run("convert", tiny("qwen3_moe"), *common, tmp_path / "x.gguf"), r"x\.gguf exists; pass --force")
    assert_sentence(run("convert", tiny("qwen3_moe"), *common, tmp_path), r"is a folder; --outfile takes a file name")
    (tmp_path / "file").touch()
    result = run("convert", tiny("qwen3_moe"), *common, tmp_path / "file" / "x.gguf")
    assert_sentence(result, "cannot write to .*file")
    assert (tmp_path / "x.gguf").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_no_place_for_the_work_folder(tiny, small_text, tmp_path):
    (tmp_path / "file").touch()
    result = run(
        *("convert", tiny("qwen3_moe"), "--bits", 3.6, "--text", small_text),
        *("--outfile", tmp_path / "x.gguf", "--work", tmp_path / "file" / "work"),
    )
    assert_sentence(result, "cannot make the work folder .*; choose another --work")


def shard_missing(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NovelMoeForCausalLM"]}))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "experts" in name and "down" in name)
    tensors[name].view(-1)[123] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (shard_missing, r"model-00002-of-00002\.safetensors is missing, though .*index\.json names it"),
        (cut_short, r"model\.safetensors is cut short: \d+ bytes found, \d+ needed"),
        (unknown_architecture, "NovelMoeForCausalLM"),
        (no_tokenizer, "has no tokenizer"),
        (no_config, r"has no config\.json"),
        (not_a_number, r"experts\.down_proj holds NaN or infinite weights"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_checkpoints(damaged, small_text, tmp_path, damage, text):
    damage(damaged)
    result = run(
        *("convert", damaged, "--bits", 3.6, "--text", small_text, "--sequences", 4, "--length", 32),
        *("--probe-tokens", 64, "--outfile", tmp_path / "x.gguf"),
    )
    assert_sentence(result, text)
    assert not (tmp_path / "x.gguf").exists()


def test_models_that_are_none(tmp_path):
    (tmp_path / "file").touch()
    for model, text in (
        (tmp_path / "nowhere", "is neither a folder nor a Hugging Face id"),
        (tmp_path / "file", "is a file, not a checkpoint folder"),
        (tmp_path, r"has no config\.json"),
    ):
        for command in (["convert", model, "--bits", 3], ["convert", model, "--bits", 3, "--dry-run"]):
            assert_sentence(run(*command, "--outfile", tmp_path / "x.gguf"), text)
        assert_sentence(run("calibrate", model), text)
        assert_sentence(run("verify", tmp_path / "file", "--against", model), text)


def test_a_dense_model(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = make_tiny("qwen3_moe", tmp_path / "dense")
    config = Qwen3Config(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    assert_sentence(run("convert", folder, "--bits", 3), "is a dense qwen3 model without experts")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"too short", r"has \d+ tokens, one sequence needs 512; give more --text"),
        (b"", r"has 0 tokens"),
        (b"\xff\xfe binary \x00" * 99, "cannot read the text .*text.bin"),
    ],
)
def test_calibration_text_that_will_not_do(tiny, tmp_path, content, text):
    (tmp_path / "text.bin").write_bytes(content)
    result = run("calibrate", tiny("qwen3_moe"), "--text", tmp_path / "text.bin", "--work", tmp_path / "w")
    assert_sentence(result, text)


def test_one_sequence_is_none_to_hold_out(tiny, small_text, tmp_path):
    folder, n_tokens = tiny("qwen3_moe"), 3600
    result = run("calibrate", folder, "--sequences", 1, "--work", tmp_path / "w")
    assert result.exit_code == 2 and "--sequences" in result.stderr
    result = run("calibrate", folder, "--text", small_text, "--length", n_tokens, "--work", tmp_path / "w")
    assert_sentence(result, "(has 1 sequence|one sequence needs)")


def test_fewer_sequences_than_asked_for_are_said(tiny, small_text, tmp_path):
    with cheap_measurements():
        result = run("calibrate", tiny("qwen3_moe"), "--text", small_text, "--length", 256, "--work", tmp_path / "w")
    assert re.search(r"note: the calibration text has \d+ sequences of 256 tokens, 128 were asked for", result.stderr)


@pytest.mark.parametrize("command", [["calibrate"], ["convert", "--bits", 3.6], ["prune", "{out}", "--share", 0.5]])
def test_what_was_calibrated_on_is_not_overwritten(command, tiny, small_text, tmp_path):
    (tmp_path / "calibration.txt").write_text(text := small_text.read_text())
    arguments = [str(part).format(out=tmp_path / "out") for part in command[1:]]
    few = ["--sequences", 4, "--length", 32, "--probe-tokens", 64, "--work", tmp_path, "--no-resume"]
    result = run(command[0], tiny("qwen3_moe"), *arguments, "--text", tmp_path / "calibration.txt", *few)
    assert_sentence(result, r"calibration\.txt is where the text that was used is written; give a copy")
    assert (tmp_path / "calibration.txt").read_text() == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--skip", 0.6], r"--skip 0\.6 is out of reach: beside each token.s top expert 0\.500"),
        (["--skip-prompt", 0.6], r"--skip-prompt 0\.6 is out of reach"),
        (["--allocator", "pmq", "--layout", "stock"], "--allocator pmq gives every expert a type of its own"),
        (["--allocator", "pmq", "--max-groups", 2], "pmq has 3 types of experts, --max-groups 2"),
        (["--allocator", "pmq", "--bits", 1.7], "below what PMQ's classes reach"),
        (["--allocator", "uniform", "--bits", 1.0], "no single type for all experts"),
        (["--recipe", "{tmp}/no/recipe.json"], "there is no folder .*no to save the recipe in"),
        (["--prune-experts", 0.25, "--outfile", "{tmp}/there.gguf"], r"there\.gguf exists; pass --force"),
        (["--outfile", "."], r"\. names no file; --outfile takes a name"),
        (
            ["--outfile", "{tmp}/a{{b}}.gguf"],
            r"a\{b\}\.gguf names no file; --outfile takes a name, \{ftype\} in it or not",
        ),
    ],
)
def test_what_cannot_be_is_said_before_the_work(options, text, tiny, small_text, tmp_path, monkeypatch):
    (tmp_path / "there.gguf").touch()
    options = [str(option).format(tmp=tmp_path) for option in options]
    monkeypatch.setattr("moe2gguf.pipeline.calibrate", None)
    monkeypatch.setattr("moe2gguf.pipeline.prune", None)
    arguments = ["convert", tiny("qwen3_moe"), "--bits", 3.6, "--text", small_text, "--outfile", tmp_path / "x.gguf"]
    assert_sentence(run(*arguments, "--sequences", 4, "--length", 32, *options), text)


def test_a_pruned_model_has_a_name_of_its_own(tiny, small_text, tmp_path, monkeypatch):
    """The whole model's file is not in its way."""
    monkeypatch.chdir(tmp_path)
    folder = tiny("qwen3_moe")
    outfile_for(open_source(folder), None, Budget(bits=3.6)).touch()

    def reached(*_):
        raise Moe2ggufError("it prunes now")

    monkeypatch.setattr("moe2gguf.pipeline.prune_to", reached)
    assert_sentence(run("convert", folder, "--bits", 3.6, "--text", small_text, "--prune-experts", 1 / 3), "prunes now")


def test_what_cannot_be_calibrated_is_said_before_text_is_written(tiny, tmp_path, monkeypatch):
    """The model is written, and its text, only for one that runs and whose tokenizer is read."""
    monkeypatch.setattr("moe2gguf.calibration_text.write_plain", None)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    custom = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(custom))
    honest = load_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe2gguf.calibration_text.load_tokenizer", lambda _: honest(tmp_path))
        for command in (
            ["convert", "--bits", 3.6, "--outfile", tmp_path / "x.gguf"],
            ["calibrate", "--work", tmp_path],
        ):
            result = run(command[0], tiny("qwen3_moe"), *command[1:])
            assert_sentence(result, "transformers cannot read the tokenizer of .*, which calibration needs")
    monkeypatch.setattr("moe2gguf.stream.find_experts", lambda layer: None)
    for options in ([], ["--dry-run"]):
        arguments = ["convert", tiny("qwen3_moe"), "--bits", 3.6, "--outfile", tmp_path / "x.gguf", *options]
        assert_sentence(run(*arguments), "transformers holds qwen3_moe's in a form that is not supported")


def test_a_card_that_cannot_be(done, small_text, tmp_path, monkeypatch):
    monkeypatch.setattr("moe2gguf.evaluate.evaluate", None)
    file = shutil.copy(done.results["stock"].path, tmp_path / "a.gguf")
    result = run("card", file, "--text", small_text)
    assert result.exit_code == 2 and "needs --base" in result.stderr
    (tmp_path / "latin").write_bytes("Prüfung".encode("latin-1"))
    assert_sentence(run("card", file, "--base", file, "--text", tmp_path / "latin"), "cannot read the text .*latin")
    (tmp_path / "README.md").touch()
    assert_sentence(run("card", file, "--base", file), r"README\.md exists; pass --force")


def test_a_full_disk(tiny, small_text, tmp_path, monkeypatch):
    """safetensors says so with an error of its own."""

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("moe2gguf.stats.save_file", full)
    few = ["--sequences", 4, "--length", 32, "--probe-tokens", 64]
    with cheap_measurements():
        result = run("calibrate", tiny("qwen3_moe"), "--text", small_text, *few, "--work", tmp_path / "w")
    assert_sentence(result, r"cannot be written or read \(.*No space left on device.*\); make room there")


def test_a_recipe_without_feedback_says_what_was_done(done, small_text, tmp_path):
    """Routers and scales are left as they are."""
    arguments = ["convert", done.folder, "--bits", 3.6, *request(done, small_text), "--outfile", tmp_path / "x.gguf"]
    with cheap_measurements():
        result = run(*arguments, "--no-feedback", "--recipe", tmp_path / "recipe.json")
    assert result.exit_code == 0, result.output
    quantizer = json.loads((tmp_path / "recipe.json").read_text())["quantizer"]
    assert not quantizer["feedback"] and quantizer["router"] == "none" and not quantizer["tuning"]
    # a plan of the replay is of what the recipe says, without statistics too
    replay = ["convert", done.folder, "--recipe", tmp_path / "recipe.json", "--text", small_text]
    n_bytes = json.loads((tmp_path / "recipe.json").read_text())["allocation"]["tensor_bytes"]
    for work in (done.work, tmp_path / "empty"):
        plan = run(*replay, "--work", work, "--outfile", tmp_path / "y.gguf", "--dry-run")
        assert plan.exit_code == 0 and "provisional" not in plan.stdout, plan.output
        assert f"{n_bytes:,} bytes" in plan.stdout and "mean KL divergence" in plan.stdout


@pytest.mark.parametrize("options", [["--router", "qesc"], ["--tune"]])
def test_what_comes_after_error_feedback_and_none(options, tiny):
    result = run("convert", tiny("qwen3_moe"), "--bits", 3.6, "--no-feedback", *options)
    assert result.exit_code == 2 and f"{' '.join(options)} comes after error feedback" in result.stderr


def test_thresholds_in_a_file_for_any_runtime(done, small_text, tmp_path):
    arguments = ["convert", done.folder, "--bits", 3.6, *request(done, small_text), "--no-feedback", "--skip", 0.1]
    with cheap_measurements():
        stock = run(*arguments, "--layout", "stock", "--outfile", tmp_path / "stock.gguf")
        grouped = run(*arguments, "--outfile", tmp_path / "grouped.gguf")
    said = "it takes the patched runtime to leave them out"
    assert said in stock.stderr and said not in grouped.stderr


def test_the_name_tells_the_size(done, small_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = int(done.results["grouped"].path.stat().st_size)
    arguments = ["convert", done.folder, "--size", size, *request(done, small_text), "--dry-run"]
    with cheap_measurements():
        result = run(*arguments)
    assert re.search(r"MQ[3-9]_\d", result.stdout), result.output


def test_files_of_other_stages_and_models(done, tiny, tmp_path):
    stats, other = done.work / "stats.safetensors", tiny("qwen3_moe", n_experts=4)
    bad = tmp_path / "bad"
    bad.write_text("{}")
    allocate = ["allocate", done.folder, "--bits", 3.6, "--outfile", tmp_path / "a.json", "--stats"]
    assert_sentence(run(*allocate, bad), "bad is not a statistics file")
    assert_sentence(run(*allocate, done.folder / "model.safetensors"), "is not a statistics file")
    assert_sentence(run("allocate", other, *allocate[2:], stats), "made on another model")
    result = run("allocate", done.folder, "--bits", 3.6, "--outfile", tmp_path / "no" / "a.json", "--stats", stats)
    assert_sentence(result, r"cannot write .*a\.json")
    assert run(*allocate, stats).exit_code == 0

    quantize = ["--stats", stats, "--outfile", tmp_path / "x.gguf", "--allocation"]
    assert_sentence(run("quantize", done.folder, *quantize, bad), "bad is not an allocation")
    assert_sentence(run("quantize", other, *quantize, tmp_path / "a.json"), "another model")
    # an allocation written by hand, or of an edited file
    content = json.loads((tmp_path / "a.json").read_text())
    for change in ({"source_sha256": "0" * 64}, {"types": {**content["types"], "blk.9.attn_q.weight": "Q4_K"}}):
        (tmp_path / "other.json").write_text(json.dumps(content | change))
        result = run("quantize", done.folder, *quantize, tmp_path / "other.json")
        assert_sentence(result, "the allocation belongs to another model")
    (tmp_path / "x.gguf").touch()
    result = run("quantize", done.folder, *quantize, tmp_path / "a.json")
    assert_sentence(result, r"x\.gguf exists; pass --force")
    assert run("quantize", done.folder, *quantize, tmp_path / "a.json", "--force").exit_code == 0
    assert (tmp_path / "x.gguf").stat().st_size > 1000


def test_files_that_are_no_gguf(done, tmp_path):
    (tmp_path / "x.gguf").write_text("hello")
    assert_sentence(run("inspect", tmp_path / "x.gguf"), r"x\.gguf")
    assert_sentence(run("inspect", tmp_path / "nowhere.gguf"), r"nowhere\.gguf")
    assert_sentence(run("verify", tmp_path / "x.gguf", "--against", done.folder), r"x\.gguf")


def test_a_damaged_file_fails_verification(done, tmp_path):
    path = tmp_path / "x.gguf"
    content = bytearray(done.results["stock"].path.read_bytes())
    content[-200_000:] = np.random.default_rng(0).bytes(200_000)
    path.write_bytes(content)
    result = run("verify", path, "--against", done.folder)
    assert result.exit_code == 1 and "problem" in result.output and "Traceback" not in result.output


def test_candidates_are_taken_in_any_case():
    result = run("convert", "/nowhere", "--bits", 3, *(a for t in CANDIDATES for a in ("--types", t.name.lower())))
    assert_sentence(result, "neither a folder nor")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent as Ctrl-C sends it")
def test_ctrl_c(tiny, small_text, tmp_path):
    """In the middle of the calibration: one sentence, 130, and nothing half-written."""
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "moe2gguf.cli", "convert", tiny("qwen3_moe"), "--bits", "3.6"),
            *("--text", small_text, "--sequences", "4", "--length", "32", "--outfile", tmp_path / "x.gguf"),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # a test run in the background of a shell is started deaf to it, and hands that down
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stderr is not None
    said = []
    for line in child.stderr:
        said.append(line)
        if line.startswith("layer "):
            break
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=300)
    assert child.returncode == 130, (said, stderr)
    assert stdout == "" and "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "moe2gguf: interrupted; statistics already written are kept"
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_a_device_that_is_not_there(tiny, tmp_path):
    """Asked for by name it is an error, before any work."""
    result = run("convert", tiny("qwen3_moe"), "--bits", 4, "--device", "tpu", "--outfile", tmp_path / "x.gguf")
    assert result.exit_code == 1
    assert "there is no device 'tpu'; it is auto, cpu, cuda or cuda:<number>" in result.stderr
    assert not list(tmp_path.iterdir())


# bench and report


def test_bits_of_a_benchmark():
    for wrong in ("2.5,x", "", "2.5,0"):
        result = run("bench", "demo", "--bits", wrong)
        assert result.exit_code == 2 and "is not a list of numbers above 0 like 2.1,2.5,3" in result.stderr


def test_what_cannot_be_reported(tmp_path):
    (tmp_path / "bench.json").write_text("{}", encoding="utf-8")
    result = run("report", tmp_path / "bench.json")
    assert result.exit_code == 1 and "is no record of a benchmark" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_of_further_records_documents_have_a_row_for_each_budget(tmp_path):
    recorded = REPOSITORY / "benchmarks" / "demo.json"
    one, two = (shutil.copy(recorded, tmp_path / name) for name in ("one.json", "two.json"))
    document = tmp_path / "NUMBERS.md"
    document.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n", encoding="utf-8")
    assert run("report", one, two, "--into", document).exit_code == 0
    assert document.read_text(encoding="utf-8").count("\n| demo |") == 2 * len(load_record(recorded).budgets)
    assert {path.stem for path in tmp_path.glob("*.svg")} == {
        f"one-{n}" for n in ("kld", "speed", "skipping", "experts")
    }
