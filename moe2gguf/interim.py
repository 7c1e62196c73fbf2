"""Where a calibration that was cut off goes on: what it had found, and its streams, after one of its layers.

calibrating-0005/
    stats.safetensors   what is found of the layers passed
    interim.json        the random numbers' state, and the streams' names
    0.f32, 1.f32, …     the streams
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe2gguf.errors import Moe2ggufError
from moe2gguf.states import write
from moe2gguf.stats import CalibrationStats, load_stats, save_stats

# more often it would cost more than it saves
INTERIM_SECONDS = 300.0
INTERIM = re.compile(r"calibrating-\d{4,}(\.partial)?")


@dataclass(frozen=True)
class Passed:
    """What an earlier run left."""

    folder: Path
    n_passed: int  # layers, and the head as one more
    stats: CalibrationStats  # of these
    random_state: Mapping[str, Any]
    streams: tuple[str, ...]

    def stream(self, name: str, shape: torch.Size) -> torch.Tensor:
        path = self.folder / f"{self.streams.index(name)}.f32"
        return torch.from_numpy(np.fromfile(path, np.float32)).view(shape)


class Interim:
    def __init__(self, work_folder: Path):
        self._work_folder, self._saved = work_folder, time.monotonic()

    def save(
        self,
        n_passed: int,
        stats: Callable[[], CalibrationStats],
        random_state: Mapping[str, Any],
        streams: Iterable[tuple[str, torch.Tensor]],
    ) -> None:
        """Where the last time is long enough ago; the one before goes."""
        if time.monotonic() - self._saved < INTERIM_SECONDS:
            return
        folder = self._work_folder / f"calibrating-{n_passed:04}"
        aside = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_stats(stats(), aside / "stats.safetensors")
        names, sizes = [], []
        for i, (name, state_SLD) in enumerate(streams):
            names.append(name)
            sizes.append(state_SLD.nbytes)
            write(aside / f"{i}.f32", state_SLD)
        saved = {"random_state": random_state, "streams": names, "bytes": sizes}
        (aside / "interim.json").write_text(json.dumps(saved))
        others = _folders(self._work_folder)
        shutil.rmtree(folder, ignore_errors=True)  # of another request
        os.replace(aside, folder)
        for other in others:
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        self._saved = time.monotonic()

    def load(self, wanted: CalibrationStats) -> Passed | None:
        """Of the same request and text as those wanted."""
        for folder in sorted(_folders(self._work_folder), reverse=True):
            try:
                stats = load_stats(folder / "stats.safetensors")
                saved = json.loads((folder / "interim.json").read_text())
                n_passed = int(folder.name.partition("-")[2])
                passed = Passed(folder, n_passed, stats, saved["random_state"], tuple(saved["streams"]))
                for i, n_bytes in enumerate(saved["bytes"]):
                    if (folder / f"{i}.f32").stat().st_size != n_bytes:
                        raise ValueError  # the computer stopped before they were on the disk
            except (Moe2ggufError, OSError, ValueError, KeyError):
                continue
            if _asked(stats) == _asked(wanted):
                return passed
        return None


def remove_interim(work_folder: Path) -> None:
    for folder in work_folder.iterdir():
        if INTERIM.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _folders(work_folder: Path) -> list[Path]:
    """Those that are whole."""
    return [folder for folder in work_folder.iterdir() if (name := INTERIM.fullmatch(folder.name)) and not name[1]]


def _asked(stats: CalibrationStats) -> tuple[object, ...]:
    return stats.request, stats.source_sha256, stats.digest, stats.types, stats.seed, stats.n_probe_tokens
