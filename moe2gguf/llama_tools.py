"""llama.cpp's own programs, and their output as numbers: importance matrix, KL divergence, tokens per second.

They are of the patched tree, so they read grouped files too, and one referee measures everybody.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2gguf.child import Finished, run_child
from moe2gguf.errors import Moe2ggufError
from moe2gguf.runtime import tool

N_PROMPT, N_DECODE = 512, 64  # tokens of one speed measurement
BASE_COMPLETE = re.compile(r"Final estimate: PPL = .*\n")
COMPLETE = re.compile(r"Same top p: .*memory breakdown", re.DOTALL)  # memory is printed last
LEAST_TOKENS = 100


@dataclass(frozen=True)
class BaseRun:
    """The unquantised model on a text; its log-probabilities are kept in a file, 16 bits each."""

    perplexity: float
    perplexity_error: float
    n_chunks: int
    n_tokens: int  # scored predictions: the second half of each chunk


@dataclass(frozen=True)
class Divergence:
    """A file against the base, in nats per token; errors are standard errors of the mean."""

    perplexity: float
    perplexity_error: float
    delta_nll: float  # ln(PPL / base PPL)
    delta_nll_error: float  # paired by token
    kld_mean: float
    kld_error: float
    kld_99: float
    kld_max: float
    same_top: float
    same_top_error: float
    skipped: float | None  # share of expert activations left out; None in a file without thresholds


@dataclass(frozen=True)
class Speed:
    """Tokens per second."""

    prompt: float
    decode: float


def run_tool(
    name: str, arguments: list[object], folder: Path, environment: Mapping[str, str] | None = None
) -> Finished:
    """A tool of the runtime; its output is also left in folder/NAME.log."""
    return run_child([tool(name), *arguments], folder / f"{name}.log", what=name, environment=environment)


def importance_matrix(base: Path, text: Path, outfile: Path, n_threads: int, *, n_ctx: int = 512) -> Finished:
    """Of the text in chunks of n_ctx tokens, of the output matrix too, which without being asked it leaves out."""
    arguments = ["-m", base, "-f", text, "-o", outfile, "-c", n_ctx, "-t", n_threads, "--process-output"]
    return run_tool("llama-imatrix", arguments, outfile.parent)


def run_base(base: Path, text: Path, logits: Path, *, n_ctx: int, max_chunks: int, n_threads: int) -> BaseRun:
    """Writes the log-probabilities that files are compared with. A newline at the end of the text does not count."""
    arguments = ["-m", base, "-f", text, "-c", n_ctx, "--chunks", max_chunks, "-t", n_threads]
    output = _perplexity([*arguments, "--kl-divergence-base", logits], BASE_COMPLETE, logits.parent)
    perplexity, error = _numbers("Final estimate: PPL", output)
    n_chunks = len(re.findall(r"\[\d+\]\d", output))  # "[1]28.5861,[2]29.5147,", a number after each
    n_tokens = n_chunks * (n_ctx - 1 - n_ctx // 2)
    if n_tokens < LEAST_TOKENS:
        raise Moe2ggufError(
            f"{n_chunks} chunks of {n_ctx} tokens of {text} are {n_tokens} predictions, and llama-perplexity makes no "
            f"statistics of fewer than {LEAST_TOKENS}; give a longer text or more --chunks"
        )
    return BaseRun(perplexity, error, n_chunks, n_tokens)


def divergence(
    file: Path, logits: Path, base: BaseRun, *, n_ctx: int, n_threads: int, folder: Path, skip_strength: float = 0.0
) -> Divergence:
    """On the text of the logits. skip_strength scales the file's thresholds for skipping experts; 0 is off."""
    arguments = ["-m", file, "-c", n_ctx, "-t", n_threads, "--kl-divergence-base", logits, "--kl-divergence"]
    environment = {"LLAMA_EXPERT_SKIP": f"{skip_strength:g}", "LLAMA_EXPERT_SKIP_COUNT": "1"}
    # what is skipped is printed from verbosity 4 up
    return parse_divergence(_perplexity([*arguments, "-lv", 4], COMPLETE, folder, environment), base)


def _perplexity(
    arguments: list[object], complete: re.Pattern, folder: Path, environment: Mapping[str, str] | None = None
) -> str:
    """llama-perplexity's output, whose end a patch of ours has it wait for (ggml-org/llama.cpp#22142)."""
    output = run_tool("llama-perplexity", arguments, folder, environment).output
    if complete.search(output) is None:
        raise Moe2ggufError(
            f"the output of llama-perplexity is not complete ({folder / 'llama-perplexity.log'}); `moe2gguf runtime "
            "install` builds one that prints all of it"
        )
    return output


def parse_divergence(output: str, base: BaseRun) -> Divergence:
    """Raises Moe2ggufError where llama-perplexity printed something else than it does now."""
    perplexity, perplexity_error = _numbers("Mean PPL(Q)", output)
    kld_mean, kld_error = _numbers("Mean    KLD", output)
    same_top, same_top_error = _numbers("Same top p", output)
    shares = [
        int(skipped) / (int(computed) + int(skipped))
        for computed, skipped in re.findall(r"experts = +(\d+) computed, +(\d+) skipped", output)
    ]
    return Divergence(
        perplexity=perplexity,
        perplexity_error=perplexity_error,
        # its own "Mean ln(PPL(Q)/PPL(base))" counts what the base gives less than e^-16 of its best as e^-16
        delta_nll=math.log(perplexity / base.perplexity),
        delta_nll_error=_numbers("Mean ln(PPL(Q)/PPL(base))", output)[1],
        kld_mean=kld_mean,
        kld_error=kld_error,
        kld_99=_numbers("99.0%   KLD", output)[0],
        kld_max=_numbers("Maximum KLD", output)[0],
        same_top=same_top / 100,
        same_top_error=same_top_error / 100,
        skipped=sum(shares) / len(shares) if shares else None,
    )


def speed(file: Path, *, n_threads: int, folder: Path, skip_strength: float = 0.0) -> Speed:
    """One measurement: a prompt of 512 tokens, and 64 tokens decoded."""
    arguments: list[object] = ["-m", file, "-p", N_PROMPT, "-n", N_DECODE, "-t", n_threads, "-r", 1]
    tests = run_llama_bench(arguments, folder, {"LLAMA_EXPERT_SKIP": f"{skip_strength:g}"})
    prompt, decode = ([t["avg_ts"] for t in tests if bool(t["n_gen"]) == generates] for generates in (False, True))
    return Speed(prompt[0], decode[0])


def run_llama_bench(
    arguments: list[object], folder: Path, environment: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """llama-bench's records, one per test. Backends write to the same output, each record is a line of its own."""
    output = run_tool("llama-bench", [*arguments, "-o", "jsonl"], folder, environment).output
    tests = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not tests:
        raise Moe2ggufError(f"llama-bench printed no results; see {folder / 'llama-bench.log'}")
    return tests


def _numbers(label: str, output: str) -> list[float]:
    """Those of the line "LABEL: ..." or "LABEL = ..."."""
    line = re.search(rf"{re.escape(label)} *[:=](.*)$", output, re.MULTILINE)
    words = re.findall(r"-?(?:\d+(?:\.\d+)?(?:e[-+]\d+)?|nan)", line[1]) if line else []
    # the root of a variance that rounding put below 0, where nothing differs
    found = [0.0 if word.endswith("nan") else float(word) for word in words]
    if not found:
        raise Moe2ggufError(
            f"llama-perplexity printed no number after '{label}', so it is not the one this was made for; run "
            "`moe2gguf runtime install`"
        )
    return found
