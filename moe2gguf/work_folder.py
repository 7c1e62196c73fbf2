"""What runs leave for later ones in a work folder, and what each part of it answers.

MODEL.moe2gguf/
    text.safetensors     what the model wrote
    calibration.txt      the text that was used, to be read
    stats.safetensors    the statistics
    speeds.json          of this machine's decoding
    sampling.gguf        the model while it writes
    calibrating-0005/    where calibration goes on (interim.py)
    experts-0123456789abcdef/    what is quantised (spool.py)
    pruned-96-of-128/    a pruned checkpoint, and a work folder of its own
"""

import dataclasses
import hashlib
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch

from moe2gguf import __version__
from moe2gguf.alone import alone_in
from moe2gguf.costs import CANDIDATES, source_digest
from moe2gguf.errors import Moe2ggufError
from moe2gguf.interim import INTERIM
from moe2gguf.settings import Calibration, Quantizer
from moe2gguf.source import Source
from moe2gguf.spool import FORMAT_VERSION as SPOOL_FORMAT
from moe2gguf.spool import Spool
from moe2gguf.states import remove_left_behind
from moe2gguf.stats import FORMAT_VERSION as STATS_FORMAT
from moe2gguf.stats import CalibrationStats, load_stats
from moe2gguf.streams import Matrices, Types
from moe2gguf.text import FORMAT_VERSION as TEXT_FORMAT

STATS, TEXT, READABLE_TEXT, WRITER = "stats.safetensors", "text.safetensors", "calibration.txt", "sampling.gguf"
# of ours alone: a user's folders may lie beside
_SPOOL = re.compile(r"experts-[0-9a-f]{16}")
_PRUNED = re.compile(r"pruned-\d+-of-\d+")
# of a checkpoint's files
WEIGHTS_AND_WORDS = ("*.safetensors", "tokenizer*", "vocab*", "merges*", "special_tokens*")


def work_folder_for(source: Source, target: Path) -> Path:
    """One folder for all budgets of a model, beside its files."""
    return target.parent / f"{source.label}.moe2gguf"


def pruned_work_folder(work: Path, n_kept: int, n_experts: int) -> Path:
    """Of a model with so many of its experts."""
    return work / f"pruned-{n_kept}-of-{n_experts}"


def begin_anew(work: Path) -> None:
    """Without what earlier runs left; how fast this machine is stays known. Raises Moe2ggufError, and removes nothing,
    where another run works in it."""
    if not work.is_dir():
        return
    with ExitStack() as alone:
        left = _left_in(work)
        within = [inner for folder in left if _PRUNED.fullmatch(folder.name) for inner in _left_in(folder)]
        for folder in (work, *left, *within):
            if folder.is_dir():
                alone.enter_context(alone_in(folder))
        for path in left:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _left_in(work: Path) -> list[Path]:
    files = (STATS, TEXT, READABLE_TEXT, WRITER)
    folders = (_SPOOL, _PRUNED, INTERIM)
    return [
        path
        for path in sorted(work.iterdir())
        if path.name in files or (path.is_dir() and any(pattern.fullmatch(path.name) for pattern in folders))
    ]


def statistics_at_hand(source: Source, calibration: Calibration, work: Path) -> CalibrationStats | None:
    """The statistics in `work`, if there are any and they answer this request."""
    try:
        stats = load_stats(work / STATS)
    except Moe2ggufError:  # none, or of another version
        return None
    return stats if stats.request == request_digest(source, calibration) else None


def spool_for(
    source: Source,
    work: Path,
    device: torch.device,
    stats: CalibrationStats,
    quantizer: Quantizer,
    types: Types,
    matrices: Matrices,
) -> Spool:
    """Of its own for all that its bytes depend on."""
    depends_on = [
        __version__,
        SPOOL_FORMAT,
        stats.request,
        stats.digest,
        checkpoint_identity(source),
        quantizer.affinity,
        device.type,
        quantizer.router,
        quantizer.tuning,
        sorted(map(str, types.items())),
        sorted((name, matrix.quant_type.name) for name, matrix in matrices.items()),
    ]
    remove_left_behind(work)
    return Spool(work / f"experts-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]}")


def checkpoint_identity(source: Source) -> str:
    """Weights and tokenizer count as changed when the size or time of a file is: to read them all takes minutes."""
    files = sorted(file for pattern in WEIGHTS_AND_WORDS for file in source.path.glob(pattern))
    return f"{source_digest(source)} {[(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]}"


def request_digest(source: Source, calibration: Calibration) -> str:
    """sha256 over everything the statistics depend on.

    Of the program that is its version and the number of the stage's format, which is raised when the stage computes
    something else; a digest of the sources would throw hours of work away for a comment.
    """
    digest = hashlib.sha256(
        f"{__version__} {STATS_FORMAT} {checkpoint_identity(source)} {[t.name for t in CANDIDATES]}".encode()
    )
    digest.update(f"{TEXT_FORMAT}".encode())
    for path in calibration.text_paths:
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise Moe2ggufError(f"cannot read the calibration text {path}: {error.strerror}") from error
    digest.update(repr(dataclasses.replace(calibration, text_paths=())).encode())
    return digest.hexdigest()


def text_request(source: Source, calibration: Calibration, length: int) -> str:
    """sha256 over everything that a text by the model depends on."""
    options = calibration.writer, calibration.n_sequences, length, calibration.seed
    return hashlib.sha256(f"{__version__} {TEXT_FORMAT} {checkpoint_identity(source)} {options}".encode()).hexdigest()
