"""Encoded experts between quantisation, which goes layer by layer, and writing, which goes tensor by tensor.

One file per layer in the work folder; a layer that is there is not quantised again after a crash.

Shapes: N rows, B bytes of an encoded row.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


@dataclass(frozen=True)
class Outcome:
    """What held-out activations decided for one expert's matrix."""

    matrix: str  # "gate" | "up" | "down"
    expert: int
    quant_type: str
    damping: float | None  # of the feedback; None: ggml's bytes had less error
    error: float  # held-out output error on sampled rows, over that of ggml's bytes


@dataclass(frozen=True)
class Spool:
    """Blocks by layer, matrix ("gate", "up", "down") and the checkpoint's expert."""

    folder: Path

    def path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}.safetensors"

    def has(self, layer: int) -> bool:
        try:
            with safe_open(self.path(layer), framework="np"):
                return True
        except (OSError, SafetensorError):
            return False

    def put(self, layer: int, blocks: Mapping[tuple[str, int], np.ndarray], outcomes: list[Outcome]) -> None:
        """Written aside and renamed. blocks: uint8 (N, B) by matrix and expert."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(layer)
        aside = path.with_name(path.name + ".partial")
        header = {"outcomes": json.dumps([vars(outcome) for outcome in outcomes])}
        save_file({f"{matrix}/{expert}": block for (matrix, expert), block in blocks.items()}, aside, header)
        os.replace(aside, path)

    def get(self, layer: int, matrix: str, expert: int) -> np.ndarray:
        """uint8 (N, B)"""
        with safe_open(self.path(layer), framework="np") as file:
            return file.get_tensor(f"{matrix}/{expert}")

    def outcomes(self) -> list[Outcome]:
        found = []
        for path in sorted(self.folder.glob("layer-*.safetensors")):
            with safe_open(path, framework="np") as file:
                found += [Outcome(**fields) for fields in json.loads(file.metadata()["outcomes"])]
        return found

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
