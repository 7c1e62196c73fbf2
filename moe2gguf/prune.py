"""Static pruning: the experts that matter least leave the checkpoint, all that follows starts from what is left.

An expert matters by the mean of g‖f_e(x)‖ over the tokens routed to it (REAP, arXiv:2510.13999). GGUF has one count of
experts for all layers, so each layer gives up as many. The pruned checkpoint is written out, layer by layer: its
routing is another, so calibration and quantisation have to see it, and it can be used without them.

Shapes: S sequences, L tokens of each, E experts.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from moe2gguf.capture import LayerCapture, tokens_of
from moe2gguf.costs import source_digest
from moe2gguf.errors import Moe2ggufError, OutputError, SourceError
from moe2gguf.experts import find_experts
from moe2gguf.gguf_file import check_space
from moe2gguf.run import Note, Progress
from moe2gguf.source import Source, expert_axis
from moe2gguf.source.checkpoint import WEIGHTS_INDEX, WEIGHTS_SUFFIXES, read_json
from moe2gguf.source.stored import Shards
from moe2gguf.stream import LayerStream
from moe2gguf.text import CalibrationText

# in config.json of a pruned checkpoint: what it was made of, and which of its experts are left, by layer
RECORD = "moe2gguf_pruning"
BATCH_TOKENS = 4096

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# heads that predict further tokens, which transformers does not run: layers of their own, or after the last
_AHEAD = re.compile(r"(?:model\.)?(?:mtp\.|(?:language_model\.)?layers\.(\d+)\.)")
_N_AHEAD = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_EXPERT = re.compile(r"(\.experts\.)(\d+)(\.)")
# what has a row for every expert: fused experts, what scores them, what is added for the choice
_FUSED = re.compile(
    r"\.(experts|gate|router|input_linear|output_linear|moe)\.(?!\d)|\.(expert|e_score_correction)_bias$"
)


def n_kept(source: Source, share: float) -> int:
    """How many experts of a layer stay when a share leaves. Raises Moe2ggufError where none would, or too many."""
    if source.n_expert_groups > 1:
        raise Moe2ggufError(
            f"{source.name} chooses among {source.n_expert_groups} groups of experts first, which pruning would leave "
            "uneven; convert it without --prune-experts"
        )
    n_removed = round(share * source.n_expert)
    if n_removed == 0:
        raise Moe2ggufError(f"{share:g} of {source.n_expert} experts is less than one; prune {1 / source.n_expert:g}")
    if source.n_expert - n_removed < source.n_expert_used:
        most = 1 - source.n_expert_used / source.n_expert
        raise Moe2ggufError(
            f"pruning {share:g} leaves {source.n_expert - n_removed} experts of {source.n_expert}, and each token is "
            f"routed to {source.n_expert_used}; prune {most:g} at most"
        )
    return source.n_expert - n_removed


def shrunk(source: Source, kept: int) -> Source:
    """The shapes of the pruned model, to plan with; its tensors are those of the whole one."""

    def shape(name: str, whole: tuple[int, ...]) -> tuple[int, ...]:
        return (kept, *whole[1:]) if expert_axis(name) == 0 and whole[0] == source.n_expert else whole

    return dataclasses.replace(
        source,
        n_expert=kept,
        tensors=tuple(dataclasses.replace(t, shape=shape(t.name, t.shape)) for t in source.tensors),
    )


def pruned_folder(source: Source, share: float, work: Path) -> Path:
    """Where the checkpoint with this share of its experts pruned is, or will be. Raises as n_kept does."""
    kept = n_kept(source, share)
    name = f"{source.name}-REAP-{kept}-of-{source.n_expert}".replace(" ", "-")
    return work / f"pruned-{kept}-of-{source.n_expert}" / name


def prune(
    source: Source,
    share: float,
    folder: Path,
    request: str,
    stream: Callable[[], LayerStream],
    text: Callable[[], CalibrationText],
    progress: Progress,
    note: Note,
) -> None:
    """The checkpoint without the share of its experts that matter least, at `folder`, unless it is there already.

    `request`: digest of what the text depends on; a checkpoint there that answers another one is replaced.
    """
    record = {"source_sha256": source_digest(source), "request": request, "share": share}
    kept = n_kept(source, share)
    if folder.exists():
        there = read_json(folder / "config.json").get(RECORD) if (folder / "config.json").exists() else None
        if there is None:
            raise OutputError(f"{folder} exists and is no pruned checkpoint of ours; choose another folder")
        if record == {key: there.get(key) for key in record}:
            note(f"using the pruned checkpoint {folder}")
            return
        note(f"the pruned checkpoint {folder} answers another request: pruning anew")
        # under a name of ours: a folder that is half removed could not be told from a user's
        old = folder.with_name(f".{folder.name}.moe2gguf-old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)
    n_bytes = sum(file.stat().st_size for file in set(Shards.of(source.path).file_of.values()))
    check_space(folder.parent, folder.name, n_bytes)
    found = saliency(stream(), text().tokens_SL, progress)
    write_pruned(source, {layer: most_salient(s, kept) for layer, s in found.items()}, folder, record, progress)
    gone = [np.sort(s)[: source.n_expert - kept].sum() / s.sum() for s in found.values()]
    note(
        f"pruned {source.n_expert - kept} of the {source.n_expert} experts of each layer, which had "
        f"{np.mean(gone):.1%} of the saliency; the others are in {folder}"
    )


@torch.inference_mode()
def saliency(stream: LayerStream, tokens_SL: np.ndarray, progress: Progress) -> dict[int, np.ndarray]:
    """REAP's score of every expert by layer, f64 (E,); 0 for one that no token is routed to."""
    batch = max(1, BATCH_TOKENS // tokens_SL.shape[1])
    hidden_SLD = torch.cat([stream.embed(part) for part in torch.from_numpy(tokens_SL).long().split(batch)])
    found: dict[int, np.ndarray] = {}
    for index in range(stream.n_layers):
        with stream.layer(index) as layer:
            block = find_experts(layer)
            capture = LayerCapture(layer, block)
            with capture.listening():
                for start in range(0, len(hidden_SLD), batch):
                    progress(f"layer {index + 1}/{stream.n_layers}: which experts matter", start, len(hidden_SLD))
                    part = hidden_SLD[start : start + batch]
                    part.copy_(stream.run(index, layer, part))
            if block is None:
                continue
            x_TD, ids_TK, gates_TK = capture.routed()
            found[index] = np.zeros(block.n_experts)
            for expert in range(block.n_experts):
                tokens_n, gates_n = tokens_of(expert, ids_TK, gates_TK)
                if len(tokens_n):
                    output_nD = block.output(expert, block.activation(expert, x_TD[tokens_n]))
                    found[index][expert] = (gates_n * output_nD.norm(dim=-1)).mean()
    return found


def most_salient(saliency_E: np.ndarray, kept: int) -> list[int]:
    """The experts that stay, in their order; of equals the first."""
    return sorted(int(expert) for expert in np.argsort(-saliency_E, kind="stable")[:kept])


def write_pruned(source: Source, kept: Mapping[int, list[int]], folder: Path, record: dict[str, Any],
                 progress: Progress) -> None:  # fmt: skip
    """The checkpoint with the experts `kept` of each layer alone, and without heads that predict further tokens; one
    layer in memory at a time, aside and renamed.

    Raises SourceError for a checkpoint whose experts cannot be told apart.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for file in source.path.iterdir():
        if file.is_file() and file.suffix not in WEIGHTS_SUFFIXES and file.name != WEIGHTS_INDEX:
            shutil.copy(file, aside)
    (aside / "config.json").write_text(
        json.dumps(_config(source, kept, record), indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    shards = Shards.of(source.path)
    names_of: dict[int | None, list[str]] = {}
    for name in sorted(shards.file_of):
        if (ahead := _AHEAD.match(name)) and (ahead[1] is None or int(ahead[1]) >= source.n_layer):
            continue
        match = _LAYER.search(name)
        names_of.setdefault(int(match[1]) if match else None, []).append(name)
    parts = sorted(names_of, key=lambda layer: -1 if layer is None else layer)
    weight_map: dict[str, str] = {}
    for done, layer in enumerate(parts):
        progress("pruned checkpoint", done, len(parts))
        with shards.slices(names_of[layer]) as slices:
            tensors = _kept_tensors(slices, None if layer is None else kept.get(layer), source)
        file_name = f"model-{done + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file(tensors, aside / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (aside / WEIGHTS_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, folder)


def _config(source: Source, kept: Mapping[int, list[int]], record: dict[str, Any]) -> dict[str, Any]:
    config = read_json(source.path / "config.json")
    n_left = len(next(iter(kept.values())))
    # of a model that sees pictures too
    of_text = config.get("text_config", config)
    counts = [key for key in _COUNTS if of_text.get(key) == source.n_expert]
    if not counts:
        raise SourceError(f"no number of experts ({', '.join(_COUNTS)}) in {source.path / 'config.json'}")
    of_text |= {key: 0 for key in _N_AHEAD if key in of_text} | dict.fromkeys(counts, n_left)
    named = {str(layer): experts for layer, experts in sorted(kept.items())}
    return config | {RECORD: record | {"kept_experts": named}}


def _fused_axis(name: str, shape: list[int], n_experts: int) -> int | None:
    """Which runs over the experts of a tensor that has all of them."""
    if _FUSED.search(name) is None:
        return None
    # ERNIE's bias for the choice is a matrix of one row
    return 0 if shape[:1] == [n_experts] else 1 if shape == [1, n_experts] else None


def _kept_tensors(slices: Mapping[str, Any], kept: list[int] | None, source: Source) -> dict[str, torch.Tensor]:
    """One layer's tensors by name. `kept`: None for a layer that has no experts."""
    tensors: dict[str, torch.Tensor] = {}
    n_pruned = 0
    for name, part in slices.items():
        match = _EXPERT.search(name)
        axis = _fused_axis(name, part.get_shape(), source.n_expert)
        if kept is None or (match is None and axis is None):
            tensors[name] = part[:]
            continue
        n_pruned += 1
        if axis is not None:
            tensors[name] = part[:].index_select(axis, torch.tensor(kept))
        elif match is not None and int(match[2]) in kept:
            tensors[_EXPERT.sub(rf"\g<1>{kept.index(int(match[2]))}\g<3>", name)] = part[:]
    if kept is not None and not n_pruned:
        raise SourceError(
            f"no experts found by name beside {next(iter(slices))} of {source.path}; please report the model"
        )
    return tensors
