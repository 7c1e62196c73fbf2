"""The checkpoint folder: where it is, and whether it is whole, said before anything reads weights."""

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import moe2gguf
from moe2gguf.errors import SourceError

DEMO = "demo"
WEIGHTS_INDEX = "model.safetensors.index.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "README.md", "LICENSE*"]
# the same weights once more, as their authors' own programs read them
HUB_COPIES = ["original/*", "metal/*", "consolidated*"]
# of files with weights, in the formats that there are
WEIGHTS_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
)


def resolve_model(model: str | Path) -> Path:
    """The folder of `model`: "demo" is the bundled one, else a folder, else a Hugging Face id to download.

    Raises SourceError if there is no such folder and no such repository, or no way to reach it.
    """
    if model == DEMO:
        return Path(moe2gguf.__file__).parent / "data" / DEMO
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Path(os.path.abspath(folder))  # "." has a name, and a link to a checkpoint keeps its own
    if folder.exists():
        raise SourceError(f"{model} is a file, not a checkpoint folder; give the folder with its config.json")
    if not HUB_ID.fullmatch(str(model)):
        raise SourceError(f"{model} is neither a folder nor a Hugging Face id of the form owner/name")
    return _download(str(model))


def repository_of(folder: Path) -> str | None:
    """OWNER/NAME of a snapshot in the Hub's cache, models--OWNER--NAME/snapshots/COMMIT."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)


def published_name(folder: Path) -> str | None:
    """Of such a snapshot, whose own name is the commit's."""
    repository = repository_of(folder)
    return None if repository is None else repository.rpartition("/")[2]


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES))
    except GatedRepoError as error:
        raise SourceError(f"{hub_id} is gated; accept its terms on the Hub, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{hub_id} is neither a folder here nor a repository you can see on the Hub") from error
    # whichever HTTP library the Hub's client uses, its errors come through; and a full disk's
    except Exception as error:
        raise SourceError(
            f"{hub_id} is not a folder here, and cannot be downloaded ({type(error).__name__}: {error}); check the "
            "network and the disk, or give a folder"
        ) from error


def check_files(folder: Path) -> None:
    """Raises SourceError unless configuration, tokenizer and every weight file are there and whole."""
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    read_json(folder / "config.json")
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise SourceError(f"{folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the model's there")
    names_of_file: dict[str, set[str]] = {}
    if (folder / WEIGHTS_INDEX).is_file():
        for tensor_name, file_name in read_json(folder / WEIGHTS_INDEX)["weight_map"].items():
            names_of_file.setdefault(file_name, set()).add(tensor_name)
    else:
        names_of_file = {file.name: set() for file in folder.glob("model*.safetensors")}
    if not names_of_file:
        raise SourceError(f"{folder} has no model*.safetensors; convert the checkpoint to safetensors first")
    for file_name, tensor_names in sorted(names_of_file.items()):
        if not (folder / file_name).is_file():
            raise SourceError(f"{folder / file_name} is missing, though {WEIGHTS_INDEX} names it; download it again")
        absent = tensor_names - safetensors_names(folder / file_name)
        if absent:
            raise SourceError(
                f"{folder / file_name} lacks {min(absent)} and {len(absent) - 1} more tensors "
                f"that {WEIGHTS_INDEX} says it holds; download both again"
            )


def safetensors_names(file: Path) -> set[str]:
    """The tensor names of a safetensors file. Raises SourceError if it is corrupt or cut short."""
    found_bytes = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        needed_bytes = 8 + header_bytes
        if len(prefix) < 8 or found_bytes < needed_bytes:
            raise SourceError(f"{file} is cut short: {found_bytes} bytes found, its header alone needs {needed_bytes}")
        try:
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            needed_bytes += max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise SourceError(f"{file} is not a safetensors file: its header is corrupt; download it again") from error
    if found_bytes < needed_bytes:
        raise SourceError(f"{file} is cut short: {found_bytes} bytes found, {needed_bytes} needed; download it again")
    return set(header)


def read_json(file: Path) -> dict[str, Any]:
    """Raises SourceError if the file is not there or not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SourceError(f"{file} is not valid JSON: {error}") from error
