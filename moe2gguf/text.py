"""Calibration text: token ids in sequences of equal length, from files or written by the model itself.

Shapes: S sequences, L tokens of each.
"""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe2gguf.errors import Moe2ggufError, SourceError

# of the file, and of what it says: raised when the same request gives another text
FORMAT_VERSION = 4


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    tokens_SL: np.ndarray  # i64
    origin: str  # file names, or how the model wrote it

    @property
    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.tokens_SL, dtype="<i8").tobytes()).hexdigest()


def text_from_files(
    paths: tuple[Path, ...], model_folder: Path, n_sequences: int, sequence_tokens: int
) -> CalibrationText:
    """Sequences spread evenly over all the text; the files count by their length. Where the tokenizer begins text with
    BOS, so do they, in place of their first token, as llama-imatrix and llama-perplexity have it: some models are lost
    without."""
    tokenizer = load_tokenizer(model_folder)
    ids: list[int] = []
    for path in paths:
        ids += tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    n_whole = len(ids) // sequence_tokens
    if n_whole == 0:
        raise Moe2ggufError(
            f"the calibration text has {len(ids)} tokens, one sequence needs {sequence_tokens}; give more --text"
        )
    wanted = np.linspace(0, n_whole - 1, min(n_whole, n_sequences)).round().astype(int)
    tokens_SL = np.array(ids[: n_whole * sequence_tokens], np.int64).reshape(n_whole, sequence_tokens)[wanted]
    if (bos := tokenizer.bos_token_id) is not None and tokenizer("a")["input_ids"][0] == bos:
        tokens_SL[:, 0] = bos
    return CalibrationText(tokens_SL, ", ".join(path.name for path in paths))


def load_tokenizer(model_folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Raises SourceError where transformers does not read it, or it has a program of its own, which is not run."""
    try:
        return transformers.AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    # whatever the libraries underneath raise
    except Exception as error:
        raise SourceError(
            f"transformers cannot read the tokenizer of {model_folder}, which calibration needs: "
            f"{' '.join(str(error).split())[:300]}; a tokenizer.json beside the weights would do"
        ) from error


def read_text(path: Path) -> str:
    """Raises Moe2ggufError unless it is there and UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Moe2ggufError(f"cannot read the text {path}: {error}") from error


def save_text(text: CalibrationText, request: str, path: Path) -> None:
    """What a model wrote, and sha256 of what it was asked for; aside and renamed."""
    aside = path.with_name(path.name + ".partial")
    save_file({"tokens": text.tokens_SL}, aside, {"request": request, "origin": text.origin})
    os.replace(aside, path)


def text_at_hand(request: str, path: Path) -> CalibrationText | None:
    """The text in the file, if there is one and it answers this request."""
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            if header.get("request") == request:
                return CalibrationText(file.get_tensor("tokens"), header["origin"])
    except (OSError, SafetensorError, KeyError):
        pass
    return None
