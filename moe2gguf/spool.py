"""What quantisation, which goes layer by layer, leaves for writing, which goes tensor by tensor.

experts-0123456789abcdef/
    layer-0000.safetensors       experts of a layer
    matrices-0000.safetensors    its other matrices; embeddings and head have files of their own
    routers.safetensors          routers that are kept
    scaled/                      layers and matrices with tuned scales
    tuned.safetensors            routers and norms that are kept

What is there is not quantised again after a crash.

Shapes: N rows, K columns, B bytes of an encoded row.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

# whose 64 bits a weight are in memory at a time
KEYED_ROWS = 4096
# of the files, and of what they say: raised when the same statistics and types give other bytes
FORMAT_VERSION = 13


@dataclass(frozen=True)
class Outcome:
    """What held-out activations, for embeddings held-out gradients, decided for one matrix."""

    matrix: str  # "gate" | "up" | "down" of an expert, or a module: "layers.0.self_attn.q_proj", "lm_head"
    expert: int | None
    quant_type: str
    damping: float | None  # of the feedback; None: ggml's bytes had less error
    error: float  # held-out output error on sampled rows, each for itself, over that of ggml's bytes


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
    n_scaled: int  # matrices whose blocks' scales are kept
    kl_before: float  # nats per token
    kl_after: float
    agreement_before: float
    agreement: float


def row_keys(weight_NK: np.ndarray) -> np.ndarray:
    """u64 (N,): by which a row is known again, as some converters have rows in another order than the checkpoint."""
    odd_K = np.random.default_rng(0).integers(0, 1 << 63, weight_NK.shape[1], np.uint64) * 2 + 1
    keys_N = np.empty(len(weight_NK), np.uint64)
    for first in range(0, len(weight_NK), KEYED_ROWS):
        own = slice(first, first + KEYED_ROWS)
        bits_RK = np.ascontiguousarray(weight_NK[own], np.float32).view(np.uint32)
        # 0 has a multiple too
        keys_N[own] = ((bits_RK.astype(np.uint64) + 1) * odd_K).sum(1, dtype=np.uint64)
    return keys_N


@dataclass(frozen=True)
class Spool:
    """Blocks by layer, matrix ("gate", "up", "down") and the checkpoint's expert; of other matrices by their module."""

    folder: Path

    def path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}.safetensors"

    def has(self, layer: int) -> bool:
        return _is_whole(self.path(layer))

    def put(self, layer: int, blocks: Mapping[tuple[str, int], np.ndarray], outcomes: list[Outcome]) -> None:
        """blocks: uint8 (N, B) by matrix and expert."""
        header = {"outcomes": json.dumps([vars(outcome) for outcome in outcomes])}
        self._save(self.path(layer), {f"{m}/{expert}": block for (m, expert), block in blocks.items()}, header)

    def _part(self, part: int | str) -> Path:
        """Of a layer, or of a module beside the layers."""
        return self.folder / f"matrices-{f'{part:04d}' if isinstance(part, int) else part}.safetensors"

    def has_matrices(self, part: int | str) -> bool:
        return _is_whole(self._part(part))

    def put_matrices(
        self, part: int | str, matrices: Mapping[str, tuple[np.ndarray, np.ndarray]], outcomes: list[Outcome]
    ) -> None:
        """All of the part: by module weights f32 (N, K), of which only keys are kept, and blocks uint8 (N, B)."""
        arrays = {f"blocks/{name}": blocks_NB for name, (_, blocks_NB) in matrices.items()}
        arrays |= {f"keys/{name}": row_keys(weight_NK) for name, (weight_NK, _) in matrices.items()}
        self._save(self._part(part), arrays, {"outcomes": json.dumps([vars(outcome) for outcome in outcomes])})

    def matrix(self, module: str, weight_NK: np.ndarray) -> np.ndarray | None:
        """uint8 (N, B), rows as in f32 weight_NK; None where the module, or a row, is not there."""
        part = int(module.split(".")[1]) if module.startswith("layers.") else module
        try:
            with safe_open(self._as_written(self._part(part)), framework="np") as file:
                if f"keys/{module}" not in file.keys():  # noqa: SIM118 (no iterator)
                    return None
                place = {key: row for row, key in enumerate(file.get_tensor(f"keys/{module}").tolist())}
                rows = [place.get(key) for key in row_keys(weight_NK).tolist()]
                return None if None in rows else file.get_tensor(f"blocks/{module}")[rows]
        except (OSError, SafetensorError):
            return None

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
                said = file.metadata()
                return Tuned(weights, int(said.pop("n_scaled")), **{name: float(said[name]) for name in said})
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
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".partial")
        save_file(dict(arrays), aside, header)
        os.replace(aside, path)

    @contextmanager
    def open(self, layer: int) -> Iterator[Callable[[str, int], np.ndarray]]:
        """By matrix and expert, uint8 (N, B). A header has hundreds of names, which are read once for all."""
        with safe_open(self._as_written(self.path(layer)), framework="np") as file:
            yield lambda matrix, expert: file.get_tensor(f"{matrix}/{expert}")

    def get(self, layer: int, matrix: str, expert: int) -> np.ndarray:
        """uint8 (N, B)"""
        with self.open(layer) as get:
            return get(matrix, expert)

    def put_scaled(
        self, part: int | str, experts: Mapping[tuple[str, int], np.ndarray], matrices: Mapping[str, np.ndarray]
    ) -> None:
        """Blocks of a layer, or of a module beside the layers, that `get` and `matrix` give from now on in place of
        those that were put."""
        if isinstance(part, int) and experts:
            self._put_scaled(self.path(part), {f"{m}/{expert}": block for (m, expert), block in experts.items()})
        if matrices:
            self._put_scaled(self._part(part), {f"blocks/{name}": block for name, block in matrices.items()})

    def _put_scaled(self, path: Path, blocks: dict[str, np.ndarray]) -> None:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        self._save(self._scaled / path.name, arrays | blocks, {})

    def remove_scaled(self) -> None:
        shutil.rmtree(self._scaled, ignore_errors=True)

    @property
    def _scaled(self) -> Path:
        return self.folder / "scaled"

    def _as_written(self, path: Path) -> Path:
        scaled = self._scaled / path.name
        return scaled if scaled.is_file() else path

    def outcomes(self) -> list[Outcome]:
        found = []
        parts = (self.folder.glob(f"{kind}-*.safetensors") for kind in ("layer", "matrices"))
        for path in itertools.chain(*map(sorted, parts)):
            with safe_open(path, framework="np") as file:
                found += [Outcome(**fields) for fields in json.loads(file.metadata()["outcomes"])]
        return found

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="np"):
            return True
    except (OSError, SafetensorError):
        return False
