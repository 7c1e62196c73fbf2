"""The writer: a plan and its blocks to GGUF, streamed, written aside and renamed."""

import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGUFValueType as ValueType

from moe2gguf.alone import alone_in
from moe2gguf.errors import OutputError
from moe2gguf.ggml import QuantType
from moe2gguf.quantize import FilePlan, TensorPlan, encode_tensors
from moe2gguf.run import Progress
from moe2gguf.source import Source
from moe2gguf.spool import Spool

# the loader of the patched runtime strips it; stock llama.cpp names it as an unknown architecture
GROUPED_SUFFIX = "+grouped"

KeyValues = dict[str, tuple[Any, ValueType, ValueType | None]]  # key -> value, type, type of an array's elements


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the file goes and how it may be cut."""

    path: Path
    split_max_bytes: int = 0
    split_max_tensors: int = 0
    overwrite: bool = False


class _Blocks(np.ndarray):
    """What the writer is given: numpy's own tofile goes past the file's buffer, and on a full disk says neither why a
    write failed nor that its last bytes did."""

    def tofile(self, file: BinaryIO) -> None:  # type: ignore[override]
        file.write(self.data)


def check_target(target: Target, n_bytes: int) -> None:
    """Before hours of work: raises OutputError if the target exists, cannot be written, or the disk is too small."""
    folder = target.path.parent
    if target.path.is_dir():
        raise OutputError(f"{target.path} is a folder; --outfile takes a file name")
    if not target.overwrite and (existing := _existing(target.path)):
        raise OutputError(f"{existing} exists; pass --force to replace it, or choose another --outfile")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".moe2gguf-"):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another --outfile") from error
    check_space(folder, target.path.name, n_bytes)


def check_space(folder: Path, name: str, n_bytes: int) -> None:
    """Raises OutputError where the folder's disk cannot take so many bytes more."""
    if (free := shutil.disk_usage(folder).free) < n_bytes:
        raise OutputError(f"{folder} has {free:,} bytes free, {name} needs {n_bytes:,}; make room there")


def _existing(path: Path) -> Path | None:
    """The file, or the first shard that would be in its place."""
    shards = sorted(path.parent.glob(f"{escape(path.stem)}-00001-of-*.gguf"))
    return path if path.exists() else shards[0] if shards else None


def write_gguf(
    source: Source,
    plan: FilePlan,
    tensors: Iterator[tuple[TensorPlan, np.ndarray]],
    extra_kv: KeyValues,
    target: Target,
) -> list[Path]:
    """The files written: one, or the shards in order. Nothing appears under the final name before all is done."""
    with _aside(target.path) as aside:
        writer = _writer(source, plan, extra_kv, target, aside)
        try:
            for tensor, blocks in tensors:
                assert blocks.nbytes == tensor.n_bytes, tensor.name
                writer.write_tensor_data(blocks.view(_Blocks))
        finally:
            writer.close()
        files = sorted(aside.iterdir())
        for file in files:
            _sync(file)
        _sync_folder(aside)
        # the first shard comes last: until it is there, a conversion that is cut off has left nothing to be in the way
        for file in reversed(files):
            os.replace(file, target.path.parent / file.name)
        written = [target.path.parent / file.name for file in files]
        if target.overwrite:
            for old in (target.path, *target.path.parent.glob(f"{escape(target.path.stem)}-0*-of-0*.gguf")):
                if old not in written:
                    old.unlink(missing_ok=True)
        _sync_folder(target.path.parent)
        return written


def write_plan(
    source: Source,
    plan: FilePlan,
    extra_kv: KeyValues,
    target: Target,
    n_threads: int,
    progress: Progress,
    spool: Spool | None = None,
    modules: Mapping[str, str] = MappingProxyType({}),
) -> list[Path]:
    """As write_gguf, of tensors that are encoded now, or come out of the spool where it has them."""
    encoded = encode_tensors(
        plan, n_threads, lambda name, done, total: progress(f"write {name}", done, total), spool, modules
    )
    return write_gguf(source, plan, encoded, extra_kv, target)


def write_plain(source: Source, plan: FilePlan, outfile: Path, n_threads: int, progress: Progress) -> Path:
    """A file that nothing is to be said in, in place of the one that is there."""
    target = Target(outfile, overwrite=True)
    check_target(target, plan.tensor_bytes)
    return write_plan(source, plan, {}, target, n_threads, progress)[0]


def _sync(path: Path) -> None:
    """To the disk: what it was made of is removed next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """As far as its file system can: those of other systems refuse."""
    with suppress(OSError):
        _sync(path)


def file_bytes(source: Source, plan: FilePlan, extra_kv: KeyValues) -> int:
    """Exact size of the unsplit file: its header is really written, to a temporary folder."""
    with TemporaryDirectory() as folder:
        target = Target(Path(folder) / "header.gguf")
        _writer(source, plan, extra_kv, target, Path(folder)).close()
        header = target.path.stat().st_size
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT

    def padded(n_bytes: int) -> int:
        return -(-n_bytes // alignment) * alignment

    return padded(header) + sum(padded(tensor.n_bytes) for tensor in plan.tensors)


def _writer(
    source: Source,
    plan: FilePlan,
    extra_kv: KeyValues,
    target: Target,
    folder: Path,
) -> gguf.GGUFWriter:
    """A writer with header, key-values and tensor infos already on disk."""
    arch = source.arch + (GROUPED_SUFFIX if plan.is_grouped else "")
    writer = gguf.GGUFWriter(
        folder / target.path.name,
        arch,
        split_max_size=target.split_max_bytes,
        split_max_tensors=target.split_max_tensors,
    )
    key_values = {kv.key: (kv.value, kv.type, kv.sub_type) for kv in source.kv} | extra_kv
    key_values |= {
        "general.file_type": (file_type(plan), ValueType.UINT32, None),
        "general.quantization_version": (gguf.GGML_QUANT_VERSION, ValueType.UINT32, None),
    }
    for layer, order in plan.expert_orders.items():
        key_values[f"moe2gguf.expert_order.{layer}"] = (order.tolist(), ValueType.ARRAY, ValueType.INT32)
    del key_values["general.architecture"]
    for key, (value, value_type, sub_type) in key_values.items():
        writer.add_key_value(key, value, value_type, sub_type=sub_type)
    for tensor in plan.tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.quant_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def file_type(plan: FilePlan) -> int:
    """llama.cpp's file type named after the type that most bytes are in."""
    bytes_of: dict[QuantType, int] = {}
    for tensor in plan.tensors:
        bytes_of[tensor.quant_type] = bytes_of.get(tensor.quant_type, 0) + tensor.n_bytes
    main = max(bytes_of, key=lambda t: (bytes_of[t], t), default=QuantType.F32)
    for name in (f"MOSTLY_{main.name}", f"MOSTLY_{main.name}_M", f"MOSTLY_{main.name}_S", f"ALL_{main.name}"):
        if name in gguf.LlamaFileType.__members__:
            return int(gguf.LlamaFileType[name])
    return int(gguf.LlamaFileType.GUESSED)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A folder beside the target for the work in progress, gone afterwards; disk errors get a sentence."""
    folder = path.with_name(f".{path.name}.partial")
    try:
        folder.mkdir(exist_ok=True)
        with alone_in(folder):
            for left in folder.iterdir():  # by a run that was killed
                left.unlink()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.EFBIG):
            raise
        raise OutputError(
            f"writing {path} failed: {error.strerror}; nothing was left under that name. Make room or choose another "
            "--outfile"
        ) from error
