"""Where stages work, and whom they tell how far they are."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from moe2gguf.experts import CPU

Progress = Callable[[str, int, int], None]  # what, done, total; a total of 0: not known
Note = Callable[[str], None]


def no_progress(what: str, done: int, total: int) -> None:
    pass


def no_note(text: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share, and no file depends on but by the device."""

    work: Path  # the folder of what is kept for later runs
    n_threads: int
    device: torch.device = CPU  # the model is run there, and error feedback computes
    progress: Progress = no_progress
    note: Note = no_note
