"""Reads what ``torch.save`` wrote, without torch and without running anything that the file asks for.

A file is a zip archive of stored (uncompressed) records: ``data.pkl``, a pickle in which tensors refer to storages by
key, and ``data/<key>``, the bytes of each storage. Unpickling normally calls whatever functions the file names. Here
only the names below are known: tensors become descriptors (dtype, file offset, shape), objects of the training
frameworks become inert records of their arguments, and every other name is refused.
"""

import collections
import io
import math
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import BadInputError
from ..model.release import TensorSpec
from .safetensors_files import ITEM_SIZES, StoredTensor

LARGEST_PICKLE = 1 << 30  # bytes; shapes and settings of a 671B checkpoint take about one megabyte

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "U8",
}

# Packages whose objects DeepSpeed, mmengine, xtuner and this workflow leave in a checkpoint. None of their code is
# imported or run; their objects become Inert.
INERT_PACKAGES = ("deepspeed", "mmengine", "xtuner", "transformers", "numpy", "torch", "deepseek_sft")
INERT_NAMES = {
    ("builtins", "getattr"),  # pickled bound methods (mmengine's HistoryBuffer): looked up nowhere, see Inert
    ("builtins", "complex"),
    ("builtins", "slice"),
    ("builtins", "object"),
    ("copyreg", "_reconstructor"),
    ("collections", "defaultdict"),
    ("collections", "deque"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("datetime", "datetime"),
}


class Inert:
    """Stands for an object of a framework: keeps the arguments it was pickled with and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __call__(self, *args: Any) -> "Inert":
        return Inert(*args)

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


@dataclass(frozen=True)
class Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class Archive:
    """The records of one file.

    Attributes:
        path: the file.
        records: storage key → (absolute byte offset, bytes).
        pickle: content of ``data.pkl``.
        directory: name, size and CRC-32 of every record: identifies the content without reading it.
    """

    path: Path
    records: dict[str, tuple[int, int]]
    pickle: bytes
    directory: list[tuple[str, int, int]]


class RefusedError(pickle.UnpicklingError):
    """The file asks for something that a checkpoint does not need."""


def _encode(text: str, encoding: str) -> bytes:
    # Protocol 2 writes bytes as a call of _codecs.encode.
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"_codecs.encode with encoding {encoding!r}")
    return text.encode("latin1")


class DescriptorUnpickler(pickle.Unpickler):
    """Builds descriptors; see the module's docstring."""

    def __init__(self, archive: Archive) -> None:
        super().__init__(io.BytesIO(archive.pickle))
        self.archive = archive
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("builtins", "set"): set,
            ("builtins", "frozenset"): frozenset,
            ("_codecs", "encode"): _encode,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): self.tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda function, _type, args, _state: function(*args),
        }

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) in self.known:
            return self.known[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if (module, name) in INERT_NAMES or module.split(".")[0] in INERT_PACKAGES:
            return type(name, (Inert,), {"__module__": module})
        raise RefusedError(f"it asks for {module}.{name}, which no checkpoint needs")

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _location, _elements = pid
        if kind != "storage" or not isinstance(dtype, str):
            raise RefusedError(f"unknown persistent object {kind!r}")
        return Storage(dtype, key)

    def tensor(self, storage: Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> StoredTensor:
        item = ITEM_SIZES[storage.dtype]
        elements = math.prod(shape)
        if not elements:  # ZeRO-3 leaves an empty tensor for every parameter, in every rank's file
            return StoredTensor(self.archive.path, 0, TensorSpec(tuple(shape), storage.dtype))
        expected, contiguous = 1, True
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            contiguous &= size == 1 or step == expected or elements == 0
            expected *= size
        if not contiguous:
            raise RefusedError(f"a tensor of shape {tuple(shape)} with stride {tuple(stride)} is not contiguous")
        start, size = self.archive.records[storage.key] if elements else (0, 0)
        if elements and (offset < 0 or (offset + elements) * item > size):
            raise RefusedError(f"a tensor of {elements} elements exceeds its storage {storage.key} of {size} bytes")
        return StoredTensor(self.archive.path, start + offset * item, TensorSpec(tuple(shape), storage.dtype))


def _corrupt(path: Path, reason: object) -> NoReturn:
    raise BadInputError(f"{path} is cut or corrupt: {reason}", "restore this file, or use an older checkpoint")


def open_archive(path: Path) -> Archive:
    """Read the directory and the pickle of a file written by ``torch.save``.

    Raises:
        BadInputError: missing, cut, compressed or not such a file, naming it.
    """
    records: dict[str, tuple[int, int]] = {}
    directory: list[tuple[str, int, int]] = []
    content = None
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive, open(path, "rb") as stream:
            for entry in archive.infolist():
                directory.append((entry.filename, entry.file_size, entry.CRC))
                if match := re.fullmatch(r"[^/]+/data/(\w+)", entry.filename):
                    if entry.compress_type != zipfile.ZIP_STORED:
                        _corrupt(path, f"record {entry.filename} is compressed")
                    if not entry.file_size:  # ZeRO-3 leaves an empty tensor for every parameter
                        records[match[1]] = (0, 0)
                        continue
                    stream.seek(entry.header_offset)
                    local = stream.read(30)
                    if len(local) < 30 or local[:4] != b"PK\x03\x04":
                        _corrupt(path, f"record {entry.filename} has no local header")
                    name_length, extra_length = struct.unpack("<HH", local[26:30])
                    start = entry.header_offset + 30 + name_length + extra_length
                    if start + entry.file_size > size:
                        _corrupt(path, f"record {entry.filename} ends after the file")
                    records[match[1]] = (start, entry.file_size)
                elif entry.filename.endswith("/data.pkl"):
                    if entry.file_size > LARGEST_PICKLE:
                        _corrupt(path, f"its pickle has {entry.file_size} bytes")
                    content = archive.read(entry)
                elif entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                    _corrupt(path, "it was written on a big-endian machine")
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error) as error:
        _corrupt(path, error)
    if content is None:
        _corrupt(path, "it holds no data.pkl")
    return Archive(path, records, content, directory)


def load(archive: Archive) -> Any:
    """The pickled object, with descriptors in place of tensors.

    Raises:
        BadInputError: malformed, or it asks for a name that is not known.
    """
    try:
        return DescriptorUnpickler(archive).load()
    except RefusedError as error:
        raise BadInputError(
            f"{archive.path} is refused: {error}",
            "nothing of it was executed; use a checkpoint written by DeepSpeed, mmengine or xtuner",
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        _corrupt(archive.path, f"its pickle cannot be read ({type(error).__name__}: {error})")
