"""The text that a model is calibrated on: files, or what the model writes itself."""

import functools
from collections.abc import Callable
from typing import Any

from moe2gguf.ebss import balanced_text
from moe2gguf.errors import Moe2ggufError
from moe2gguf.experts import CPU
from moe2gguf.ggml import QuantType
from moe2gguf.gguf_file import write_plain
from moe2gguf.quantize import plan_uniform
from moe2gguf.run import Run
from moe2gguf.sample import kv_bytes_per_token, sample_text, writer_type
from moe2gguf.settings import Calibration
from moe2gguf.source import Source
from moe2gguf.stream import check_runs
from moe2gguf.text import CalibrationText, load_tokenizer, save_text, text_at_hand, text_from_files
from moe2gguf.work_folder import READABLE_TEXT, TEXT, WRITER, text_request

# some to fit and some to judge by
MIN_SEQUENCES = 2


def text_of(source: Source, calibration: Calibration, run: Run) -> Callable[[], CalibrationText]:
    """The calibration text, read or written by the model when it is first asked for. Raises Moe2ggufError where it
    would be overwritten, or removed with what earlier runs left, or calibration could not make use of it."""
    check_runs(source.path)
    load_tokenizer(source.path)
    for path in calibration.text_paths:
        if path.resolve() == (run.work / READABLE_TEXT).resolve():
            raise Moe2ggufError(f"{path} is where the text that was used is written; give a copy, or another --work")
    return functools.cache(lambda: _calibration_text(source, calibration, run))


def sequence_length(source: Source, calibration: Calibration) -> int:
    """Tokens of a sequence of text: no more than the model takes."""
    return min(calibration.sequence_tokens, source.hparams.get("max_position_embeddings", calibration.sequence_tokens))


def _calibration_text(source: Source, calibration: Calibration, run: Run) -> CalibrationText:
    length, wanted = sequence_length(source, calibration), calibration.n_sequences
    if wanted < MIN_SEQUENCES:
        raise Moe2ggufError(f"{wanted} sequence of text: at least {MIN_SEQUENCES} are needed, one is held out")
    if calibration.text_paths:
        found = text_from_files(calibration.text_paths, source.path, wanted, length)
        if (n := len(found.tokens_SL)) < MIN_SEQUENCES:
            raise Moe2ggufError(
                f"the calibration text has {n} sequence of {length} tokens, at least {MIN_SEQUENCES} are needed, of "
                "which one is held out; give more --text or a smaller --length"
            )
        if n < wanted:
            run.note(f"the calibration text has {n} sequences of {length} tokens, {wanted} were asked for")
        return found
    path, request = run.work / TEXT, text_request(source, calibration, length)
    if (at_hand := text_at_hand(request, path)) is not None:
        run.note(f"using the text in {path}, which the model wrote before")
        return at_hand
    found = _written_text(source, calibration, length, run)
    save_text(found, request, path)
    return found


def _written_text(source: Source, calibration: Calibration, length: int, run: Run) -> CalibrationText:
    """By the model itself."""
    writer = run.work / WRITER
    write_plain(source, plan_uniform(source, QuantType.Q8_0, writer_type(source)), writer, run.n_threads, run.progress)
    how: dict[str, Any] = {
        "kv_bytes_per_token": kv_bytes_per_token(source),
        "n_threads": run.n_threads,
        "gpu": None if run.device == CPU else run.device.index or 0,
        "seed": calibration.seed,
    }
    try:
        if calibration.writer == "sample":
            return sample_text(
                writer,
                calibration.n_sequences,
                length,
                progress=functools.partial(run.progress, "the model writes calibration text"),
                **how,
            )
        balanced = balanced_text(
            writer,
            calibration.n_sequences,
            length,
            n_experts=source.n_expert,
            n_selected=source.n_expert_used,
            progress=functools.partial(run.progress, "the model writes balanced calibration text"),
            **how,
        )
    finally:
        writer.unlink(missing_ok=True)
    run.note(f"self-sampled texts rejected because they repeat themselves: {balanced.n_rejected}")
    return balanced.text
