"""What quantisation, which goes layer by layer, leaves for writing, which goes tensor by tensor.

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

# of the files, and of what they say: raised when the same statistics and types give other bytes
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Outcome:
    """What held-out activations decided for one expert's matrix."""

    matrix: str  # "gate" | "up" | "down"
    expert: int
    quant_type: str
    damping: float | None  # of the feedback; None: ggml's bytes had less error
    error: float  # held-out output error on sampled rows, over that of ggml's bytes


@dataclass(frozen=True)
class Routers:
    """What calibrating all of them did, on held-out text, and those that are kept."""

    router_ED: dict[int, np.ndarray]  # f32, by layer, experts in the checkpoint's order
    kl_before: float  # nats per token
    kl_after: float
    agreement_before: float  # share of selected experts that the model's own selects too
    agreement: float


@dataclass(frozen=True)
class Tuned:
    """What descent on the KL divergence did, on held-out text, and the routers and norms that are kept."""

    weights: dict[str, np.ndarray]  # f32, by the file's name, experts in the checkpoint's order
    kl_before: float  # nats per token
    kl_after: float
    agreement_before: float
    agreement: float


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
        """blocks: uint8 (N, B) by matrix and expert."""
        header = {"outcomes": json.dumps([vars(outcome) for outcome in outcomes])}
        self._save(self.path(layer), {f"{m}/{expert}": block for (m, expert), block in blocks.items()}, header)

    def put_routers(self, routers: Routers) -> None:
        header = {name: repr(value) for name, value in vars(routers).items() if name != "router_ED"}
        self._save(self._routers, {str(layer): router for layer, router in routers.router_ED.items()}, header)

    def routers(self) -> Routers | None:
        try:
            with safe_open(self._routers, framework="np") as file:
                router_ED = {int(layer): file.get_tensor(layer) for layer in file.keys()}  # noqa: SIM118 (no iterator)
                return Routers(router_ED, **{name: float(value) for name, value in file.metadata().items()})
        except (OSError, SafetensorError):
            return None

    def put_tuned(self, tuned: Tuned) -> None:
        header = {name: repr(value) for name, value in vars(tuned).items() if name != "weights"}
        self._save(self._tuned, tuned.weights, header)

    def tuned(self) -> Tuned | None:
        try:
            with safe_open(self._tuned, framework="np") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
                return Tuned(weights, **{name: float(value) for name, value in file.metadata().items()})
        except (OSError, SafetensorError):
            return None

    @property
    def _tuned(self) -> Path:
        return self.folder / "tuned.safetensors"

    @property
    def _routers(self) -> Path:
        return self.folder / "routers.safetensors"

    def _save(self, path: Path, arrays: Mapping[str, np.ndarray], header: dict[str, str]) -> None:
        """Written aside and renamed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".partial")
        save_file(dict(arrays), aside, header)
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
