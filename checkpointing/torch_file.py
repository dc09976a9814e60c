"""Files of `torch.save`, read without running anything in them; see `safe_pickle.py`."""

import io
import math
import mmap
import struct
import zipfile
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from checkpointing.safe_pickle import Name, SafePickleReader

# Structure, not tensors: a checkpoint of a hundred thousand tensors needs about this much.
MAX_PICKLE_BYTES = 16 * 2**20
_MAX_DIMENSIONS = 16
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of name and extra

Content = mmap.mmap | bytearray

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


def read_torch_file(path: str) -> Any:
    """What `torch.save` wrote: tensors and plain containers, all else as inert placeholders.

    A local file is mapped into memory: tensors that nobody touches are never read.

    Args:
        path: a file, local or any place fsspec reaches.

    Raises:
        ValueError: if the file is no whole, uncompressed zip archive of `torch.save`.
    """
    content = _content_of(path)
    if content[:4] != b"PK\x03\x04":
        raise ValueError(
            "it does not begin like a file of torch.save; files of PyTorch before 1.6 are not "
            "read: torch.load and torch.save them with a later one where they are trusted"
        )
    try:
        with fsspec.open(path, "rb") as file, zipfile.ZipFile(file) as members:
            archive = _Archive(members, content)
    except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise ValueError(f"the zip archive is cut off or damaged ({error})") from error
    return archive.load()


def _content_of(path: str) -> Content:
    """The bytes of a file; a local one is mapped, copy on write, so the file never changes."""
    fs, name = fsspec.core.url_to_fs(path)
    if not isinstance(fs, LocalFileSystem):
        return bytearray(fs.cat_file(name))
    with open(name, "rb") as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise ValueError("it is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


class _Archive:
    """The zip archive: `<top>/data.pkl`, and `<top>/data/<key>` for each storage."""

    def __init__(self, archive: zipfile.ZipFile, content: Content):
        self.content = content
        self.members = {info.filename: info for info in archive.infolist()}
        self._refuse_bombs()
        pickles = [name for name in self.members if name.count("/") == 1]
        pickles = [name for name in pickles if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("the zip archive is not one of torch.save: it has no data.pkl")
        self.top = pickles[0].removesuffix("data.pkl")
        if self.members[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl is larger than {MAX_PICKLE_BYTES} bytes")
        self.pickle = archive.read(pickles[0])
        order = f"{self.top}byteorder"
        if order in self.members and archive.read(order) != b"little":
            raise ValueError("it was written on a big-endian machine")
        self.storages: dict[str, Tensor] = {}

    def _refuse_bombs(self) -> None:
        """torch.save stores without compression, so members are never larger than the file."""
        for info in self.members.values():
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(f"{info.filename} in it is compressed or encrypted")
        if sum(info.file_size for info in self.members.values()) > len(self.content):
            raise ValueError("its members claim to be larger than the file")

    def load(self) -> Any:
        reader = SafePickleReader(
            makers={
                "torch._utils._rebuild_tensor_v2": _tensor,
                "torch._utils._rebuild_parameter": _parameter,
            },
            persistent_load=self._storage,
        )
        return reader.load(self.pickle)

    def _storage(self, persistent_id: Any) -> Tensor:
        """The numbers of ("storage", type, key, device, count), one-dimensional."""
        kind, dtype_name, key, _device, count = persistent_id
        if kind != "storage" or not isinstance(dtype_name, Name):
            raise ValueError(f"an object outside the pickle of unknown kind {kind!r}")
        if dtype_name.name not in _STORAGES:
            known = ", ".join(name.removeprefix("torch.") for name in _STORAGES)
            raise ValueError(f"tensors of {dtype_name.name}; allowed are {known}")
        dtype = _STORAGES[dtype_name.name]
        if key not in self.storages:
            self.storages[key] = self._numbers(f"{self.top}data/{key}", dtype=dtype)
        numbers = self.storages[key]
        if numbers.dtype != dtype or numbers.numel() != count:
            raise ValueError(f"storage {key} has not {count} numbers of {dtype}")
        return numbers

    def _numbers(self, name: str, *, dtype: torch.dtype) -> Tensor:
        if name not in self.members:
            raise ValueError(f"the zip archive lacks {name}")
        info = self.members[name]
        end = info.header_offset + _LOCAL_HEADER.size
        signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(
            self.content, info.header_offset
        )
        start = end + name_length + extra_length
        if signature != b"PK\x03\x04" or start + info.file_size > len(self.content):
            raise ValueError(f"{name} in it is cut off")
        if info.file_size == 0:
            return torch.empty(0, dtype=dtype)
        count, rest = divmod(info.file_size, dtype.itemsize)
        if rest:
            raise ValueError(f"{name} in it is no whole number of {dtype}")
        buffer = self.content
        if start % dtype.itemsize:  # packed again by something else than torch
            buffer, start = bytearray(buffer[start : start + info.file_size]), 0
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=start)


def _tensor(
    numbers: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, _meta: Any = None
) -> Tensor:
    """A view of a storage that stays inside it and holds no number more often than it does."""
    counts = (offset, *size, *stride)
    if not isinstance(numbers, Tensor) or not all(type(n) is int and n >= 0 for n in counts):
        raise TypeError("a tensor without storage, or of strange sizes")
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(size)} sizes and {len(stride)} strides")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > numbers.numel() or (count and last >= numbers.numel()):
        raise ValueError(f"a tensor of shape {tuple(size)} in {numbers.numel()} numbers")
    return numbers.as_strided(size, stride, offset) if count else numbers.new_empty(size)


def _parameter(data: Any, *_rest: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError("a parameter that is no tensor")
    return data
