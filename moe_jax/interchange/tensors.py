"""Folders of safetensors: one file, or shards with an index that says which tensor lies in which.

    model.safetensors
    model-00001-of-00003.safetensors ...  and model.safetensors.index.json

A tensor is read when it is asked for. A shard is written when it is full.
"""

import contextlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax import extras
from moe_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Names of dtypes in the files: those that we read.
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Those of one byte that the library has no array of NumPy for: parts of others alone.
BYTES = ("F8_E4M3",)


class Unpacked(NamedTuple):
    """A tensor that several of a file are put together to."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    # (the parts) -> the tensor.
    make: Callable[..., np.ndarray]


class Folder:
    """The tensors of a folder, by name. Enter it: files are open until it is left.

    Raises UserError for what is missing or damaged.
    """

    def __init__(self, folder: Path):
        extras.require("convert import", "safetensors")
        self.folder = folder
        self._stack = contextlib.ExitStack()
        # The file of each tensor.
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._unpacked: dict[str, Unpacked] = {}

    def __enter__(self) -> "Folder":
        told = self._told()
        # A fault on the way closes the files that are open by then.
        with contextlib.ExitStack() as stack:
            for path in sorted(set(told.values())) if told else [self.folder / SINGLE]:
                file = stack.enter_context(self._opened(path))
                for name in file.keys():
                    self._files[name], self._paths[name] = file, path
            for name, path in told.items():
                if self._paths.get(name) != path:
                    raise UserError(
                        f"{path} has no tensor {name}, although {INDEX} says so: copy both again"
                    )
            # They stay open until the folder is left.
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def add(self, name: str, tensor: Unpacked) -> None:
        """Puts a tensor in the place of its parts."""
        self._unpacked[name], self._paths[name] = tensor, self._paths[tensor.parts[0]]

    def names(self) -> set[str]:
        """Returns the names of all tensors; in place of parts, what they are put together to."""
        packed = {part for tensor in self._unpacked.values() for part in tensor.parts}
        return set(self._files) - packed | set(self._unpacked)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, by the header of its file alone."""
        if name in self._unpacked:
            return self._unpacked[name].shape
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Returns the name of a tensor's dtype. Raises UserError for one that we do not read."""
        if name in self._unpacked:
            return self._unpacked[name].dtype
        dtype = self._files[name].get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise UserError(
                f"{self._paths[name]}: {name} is {dtype}, and moe_jax reads "
                f"{', '.join(DTYPES)}: save the model in one of them, without quantization"
            )
        return DTYPES[dtype]

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, read from its file now."""
        if name in self._unpacked:
            tensor = self._unpacked[name]
            # From the files: a part may have the name of the tensor.
            return tensor.make(*(self._part(part) for part in tensor.parts))
        return self._files[name].get_tensor(name)

    def _part(self, name: str) -> np.ndarray:
        """Returns a tensor of a file, bytes of a dtype that NumPy has not."""
        file = self._files[name]
        if file.get_slice(name).get_dtype() not in BYTES:
            return file.get_tensor(name)
        # A file begins with the length of its header, which says where each tensor lies behind it.
        with self._paths[name].open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            told = json.loads(opened.read(length))[name]
            first, last = told["data_offsets"]
            opened.seek(8 + length + first)
            return np.frombuffer(opened.read(last - first), np.uint8).reshape(told["shape"])

    def where(self, name: str) -> Path:
        """Returns the file of a tensor."""
        return self._paths[name]

    def _told(self) -> dict[str, Path]:
        """Returns the file of each tensor by the index; {} where there is a single file."""
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        try:
            shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            # The name alone: an index cannot lead out of the folder.
            return {name: self.folder / Path(file).name for name, file in shards.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): copy it again") from None

    def _opened(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise UserError(f"{path} is missing{self._hint(path)}")
        try:
            # Not mapped into memory: what was read would stay there as long as the file is open.
            return safe_open(path, framework="np", backend="pread")
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is damaged ({reason}): copy it again") from None

    def _hint(self, path: Path) -> str:
        """Returns the way out where a file is missing."""
        if path.name != SINGLE:
            return f", although {INDEX} names it: copy it too"
        others = sorted(file.name for file in self.folder.glob("*.bin"))
        if others:
            return f", and {others[0]} may hold any code: save the model as safetensors first"
        return ": name a folder as save_pretrained writes it"


def write(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> int:
    """Writes tensors into shards of at most `shard_bytes` (or one tensor), with an index where they
    are several, and returns how many bytes all tensors have.

    In memory are at most the tensors of one shard.
    """
    extras.require("convert export", "safetensors")
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    total = 0
    for shard in _full(tensors, shard_bytes):
        total += sum(tensor.nbytes for tensor in shard.values())
        path = folder / _part(len(shards))
        path.touch()
        # The library lets nobody but the writer read its files.
        mode = path.stat().st_mode
        # Transformers asks for the format, whoever wrote it.
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)
        shards.append(list(shard))
        # Or it would stay while the next one is filled.
        shard.clear()
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / SINGLE)
        return total
    # Now their number is known, which is a part of each name.
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _full(
    tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the tensors of each shard."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _part(number: int) -> str:
    """Returns the name of a shard while their number is not known."""
    return f"model-{number + 1:05d}.part"
