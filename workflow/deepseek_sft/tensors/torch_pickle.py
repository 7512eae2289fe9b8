"""Reads what ``torch.save`` wrote, without torch and without running anything that the file asks for.

A file is a zip archive of stored (uncompressed) records: ``data.pkl``, a pickle in which tensors refer to storages by
key, and ``data/<key>``, the bytes of each storage. Unpickling normally calls whatever functions the file names. Here
only the names below are known: tensors become descriptors (dtype, file offset, shape), objects of the training
frameworks become inert records of their arguments, and every other name is refused.
"""

import collections
import contextlib
import hashlib
import io
import math
import pickle
import re
import resource
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..errors import BadInputError, StageError
from .safetensors_files import ITEM_SIZES, StoredTensor
from .tensor_spec import TensorSpec

LARGEST_PICKLE = 1 << 30  # bytes; shapes and settings of a 671B checkpoint take about one megabyte
LARGEST_GROWTH = 4 << 30  # bytes of address space that unpickling may take: a hostile memo index asks for any number
SAMPLES, SAMPLE_SIZE = 16, 4096  # blocks of each record without CRC-32 that enter the fingerprint
PAGE = resource.getpagesize()

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
    ("builtins", "bytearray"),
    ("builtins", "range"),
    ("builtins", "memoryview"),
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("types", "MappingProxyType"),
    ("functools", "partial"),  # what it would call is one of these, or refused
    ("re", "_compile"),
    ("uuid", "UUID"),
    ("uuid", "SafeUUID"),
    ("decimal", "Decimal"),
    ("fractions", "Fraction"),
    ("ipaddress", "IPv4Address"),
    ("ipaddress", "IPv6Address"),
    ("random", "Random"),
    ("array", "array"),
    ("array", "_array_reconstructor"),
    ("zoneinfo", "ZoneInfo"),
    ("zoneinfo", "ZoneInfo._unpickle"),
}
INERT_STANDARD = {  # standard modules of plain values, whose every class is one
    "collections": ("Counter", "ChainMap", "UserDict", "UserList", "UserString", "deque", "defaultdict"),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone", "tzinfo"),
    "pathlib": ("PosixPath", "Path", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
}
PLAIN_BUILTINS = ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple", "type")  # named, never called
LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # how torch.save began before torch 1.6


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
        name: that under which it was written, without suffix ("archive" if it was written to a stream).
        records: storage key → (absolute byte offset, bytes).
        pickle: content of ``data.pkl``.
        directory: name, size and CRC-32 of every record: identifies the content without reading it.
    """

    path: Path
    name: str
    records: dict[str, tuple[int, int]]
    pickle: bytes
    directory: list[tuple[str, int, int]]

    def sampled(self) -> bytes:
        """What stands for the content of records without CRC-32: the pickle and some blocks of each; else nothing."""
        if any(crc for _, size, crc in self.directory if size) or not self.records:
            return b""
        hasher = hashlib.sha256(self.pickle)
        with open(self.path, "rb") as stream:
            for start, size in self.records.values():
                for i in range(SAMPLES):
                    stream.seek(start + max(0, size - SAMPLE_SIZE) * i // (SAMPLES - 1))
                    hasher.update(stream.read(min(size, SAMPLE_SIZE)))
        return hasher.digest()


class RefusedError(pickle.UnpicklingError):
    """The file asks for something that a checkpoint does not need."""


class UnknownNameError(RefusedError):
    """It names a class or function that no checkpoint needs."""


STRIP = (
    ". Where it is part of the client_state given to save_checkpoint: load the file with torch if you trust it, "
    "remove that entry, and save it again"
)


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
        if module == "builtins":  # protocol 2, which torch writes, has the names of Python 2
            name = {"long": "int", "unicode": "str", "xrange": "range"}.get(name, name)
        if (module, name) in self.known:
            return self.known[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        plain = name in INERT_STANDARD.get(module.removesuffix("._local"), ()) or (
            module == "builtins" and name in PLAIN_BUILTINS
        )
        if plain or (module, name) in INERT_NAMES or module.split(".")[0] in INERT_PACKAGES:
            return type(name, (Inert,), {"__module__": module})
        raise UnknownNameError(f"it asks for {module}.{name}, which no checkpoint needs")

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


def _refuse_legacy(path: Path) -> None:
    """
    Raises:
        BadInputError: the file is in the format of torch.save without zip, whose records have no places of their own.
    """
    with open(path, "rb") as stream:
        if stream.read(len(LEGACY_MAGIC)) != LEGACY_MAGIC:
            return
    raise BadInputError(
        f"{path} is in torch.save's old format (a bare pickle, no zip archive), which is not read",
        "write each file again with torch: torch.save(torch.load(F, weights_only=False), F), where you trust them; "
        'DeepSpeed writes the new one without "checkpoint_serialization": false',
    )


def _corrupt(path: Path, reason: object) -> NoReturn:
    raise BadInputError(f"{path} is cut or corrupt: {reason}", "restore this file, or use an older checkpoint")


def _data_start(path: Path, stream: BinaryIO, entry: zipfile.ZipInfo, next_start: int) -> int:
    """Where a record's bytes begin; what stands before and after them must agree with the directory.

    torch writes a descriptor after the bytes (signature, CRC-32, sizes); other writers none.
    """
    stream.seek(entry.header_offset)
    local = stream.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        _corrupt(path, f"record {entry.filename} has no local header")
    flags, method = struct.unpack("<HH", local[6:10])
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    name = stream.read(name_length)
    start = entry.header_offset + 30 + name_length + extra_length
    end = start + entry.file_size
    descriptor = b""
    if flags & 0x8 and end < next_start:
        stream.seek(end)
        descriptor = stream.read(8)
    expected = struct.pack("<II", 0x08074B50, entry.CRC) if descriptor else b""
    after = (16, 24) if descriptor else (0,)
    if (
        name.decode("utf-8" if flags & 0x800 else "cp437") != entry.orig_filename
        or method != zipfile.ZIP_STORED
        or descriptor != expected
        or next_start - end not in after
    ):
        _corrupt(path, f"the header of record {entry.filename} contradicts the directory")
    return start


def _content(path: Path, stream: BinaryIO, entry: zipfile.ZipInfo, next_start: int) -> bytes:
    """Bytes of a small record; compared with its CRC-32 if it has one (torch can be told to leave them out)."""
    stream.seek(_data_start(path, stream, entry, next_start))
    content = stream.read(entry.file_size)
    if len(content) != entry.file_size or (entry.CRC and zlib.crc32(content) != entry.CRC):
        _corrupt(path, f"Bad CRC-32 for file {entry.filename!r}")
    return content


def open_archive(path: Path) -> Archive:
    """Read the directory and the pickle of a file written by ``torch.save``.

    Raises:
        BadInputError: missing, cut, compressed or not such a file, naming it.
    """
    records: dict[str, tuple[int, int]] = {}
    directory: list[tuple[str, int, int]] = []
    content, name = None, ""
    try:
        _refuse_legacy(path)
        with zipfile.ZipFile(path) as archive, open(path, "rb") as stream:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            ends = [entry.header_offset for entry in entries[1:]] + [archive.start_dir]
            if len({entry.filename for entry in entries}) < len(entries):
                _corrupt(path, "it holds two records of one name")
            for entry, next_start in zip(entries, ends, strict=True):
                directory.append((entry.filename, entry.file_size, entry.CRC))
                if entry.compress_type != zipfile.ZIP_STORED:
                    _corrupt(path, f"record {entry.filename} is compressed")
                if match := re.fullmatch(r"[^/]+/data/(\w+)", entry.filename):
                    # ZeRO-3 leaves an empty tensor for every parameter
                    start = _data_start(path, stream, entry, next_start) if entry.file_size else 0
                    records[match[1]] = (start, entry.file_size)
                elif match := re.fullmatch(r"([^/]+)/data\.pkl", entry.filename):
                    if entry.file_size > LARGEST_PICKLE:
                        _corrupt(path, f"its pickle has {entry.file_size} bytes")
                    content, name = _content(path, stream, entry, next_start), match[1]
                elif entry.filename.endswith("/byteorder") and _content(path, stream, entry, next_start) != b"little":
                    _corrupt(path, "it was written on a big-endian machine")
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error) as error:
        _corrupt(path, error)
    if content is None:
        _corrupt(path, "it holds no data.pkl")
    return Archive(path, name, records, content, directory)


_limit_lock = threading.Lock()  # the limit is the process's: of two threads one would take the other's for its own


@contextlib.contextmanager
def _bounded_growth() -> Iterator[None]:
    """Let this process take only so much more address space: what asks for more gets MemoryError, not the machine."""
    with _limit_lock:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm", encoding="ascii") as stream:
            limit = int(stream.read().split()[0]) * PAGE + LARGEST_GROWTH
        if soft != resource.RLIM_INFINITY:
            limit = min(limit, soft)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def load(archive: Archive) -> Any:
    """The pickled object, with descriptors in place of tensors.

    Raises:
        BadInputError: malformed, or it asks for a name that is not known.
    """
    try:
        with _bounded_growth():
            return DescriptorUnpickler(archive).load()
    except RefusedError as error:
        raise BadInputError(
            f"{archive.path} is refused: {error}",
            "nothing of it was executed; use a checkpoint written by DeepSpeed, mmengine or xtuner"
            + (STRIP if isinstance(error, UnknownNameError) else ""),
        ) from None
    except StageError:  # asked to stop meanwhile
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        _corrupt(archive.path, f"its pickle cannot be read ({type(error).__name__}: {error})")
