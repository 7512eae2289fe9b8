"""Files of ``torch.save`` in two parts: described at once, written later, byte for byte what ``torch.save`` writes.

What is pickled (names, shapes, counts, and small tensors) is taken as it is when the file is described. The storages of
large tensors are only referred to: nobody may change them until the file is written. torch is pinned: a file is what
``torch.serialization._save`` makes of it, whose records are kept here instead of written.
"""

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import serialization

COPIED = 1 << 20  # bytes; storages up to here are copied when a file is described
PIECE = 1 << 26  # bytes of pinned memory, twice, through which a GPU's storages travel


@dataclass(frozen=True)
class DeferredFile:
    """A file that is described and not written.

    Attributes:
        records: name, content and bytes of each record in its order.
        ready: of the GPU that holds storages: work that was queued before the file was described.
    """

    path: Path
    records: list[tuple[str, Any, int]]
    ready: torch.cuda.Event | None

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size in self.records)


class _Records:
    """In the place of torch's file: keeps the records that it is told to write."""

    def __init__(self) -> None:
        self.storages: dict[str, torch.UntypedStorage] = {}
        self.records: list[tuple[str, Any, int]] = []

    def write_record(self, name: str, content: Any, size: int) -> None:
        self.records.append((name, content, size))

    def write_record_metadata(self, name: str, size: int) -> None:
        storage = self.storages[name.removeprefix("data/")]
        self.records.append((name, storage.cpu().clone() if size <= COPIED else storage, size))

    def pickling(self) -> Any:
        """A pickle module whose pickler notes the storages that it meets, by the number of their record."""
        storages = self.storages

        class Pickler(pickle.Pickler):
            def __init_subclass__(cls, **words: Any) -> None:
                super().__init_subclass__(**words)
                asked = cls.persistent_id  # torch's, which numbers the storages

                def persistent_id(self: Any, found: Any) -> Any:
                    named = asked(self, found)
                    if named is not None:
                        typed = isinstance(found, torch.storage.TypedStorage)
                        storages[named[2]] = found._untyped_storage if typed else found
                    return named

                cls.persistent_id = persistent_id

        class Module:
            pass

        Module.Pickler = Pickler
        return Module


def describe(content: Any, path: Path) -> DeferredFile:
    """What ``torch.save(content, path)`` would write now."""
    records = _Records()
    with serialization.skip_data():
        serialization._save(content, records, records.pickling(), serialization.DEFAULT_PROTOCOL, False)
    devices = {s.device for s in records.storages.values() if s.device.type == "cuda"}
    event = None
    if devices:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(devices.pop()))
    return DeferredFile(path, records.records, event)


@contextlib.contextmanager
def collected(deepspeed: Any, alone: bool = False) -> Iterator[list[DeferredFile]]:
    """Files that DeepSpeed's engine saves meanwhile are described, not written.

    Args:
        alone: it puts no scripts beside them either, which a full disk would refuse on rank 0 alone.
    """
    files: list[DeferredFile] = []
    writer = deepspeed.checkpoint_engine
    writer.save = lambda state_dict, path: files.append(describe(state_dict, Path(path)))
    if alone:
        deepspeed._copy_recovery_script = lambda save_path: None
    try:
        yield files
    finally:
        del writer.save  # its class's method is there again
        if alone:
            del deepspeed._copy_recovery_script


@dataclass
class Landing:
    """Host memory in which one storage of a GPU lies while it is written; used again for the next."""

    piece: int = PIECE
    _record: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _pieces: list[torch.Tensor] = field(default_factory=list)

    def of(self, storage: torch.UntypedStorage, ready: torch.cuda.Event | None) -> torch.UntypedStorage:
        """The storage itself where it lies in host memory, else a copy that the next call writes over."""
        if storage.device.type == "cpu":
            return storage
        stream = torch.cuda.Stream(storage.device)
        with torch.cuda.stream(stream):  # also sets the device, which a new thread takes for the first
            if ready is not None:
                stream.wait_event(ready)
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            return self.bring(source, stream.record_event, pinned=True)

    def bring(
        self, source: torch.Tensor, mark: Callable[[], torch.cuda.Event] | None, pinned: bool
    ) -> torch.UntypedStorage:
        """Copy ``source`` (flat bytes), one piece travelling while the one before it is put in place.

        Args:
            mark: records an event behind the copy that was queued last; None where copies are done when they return.
        """
        if self._record.numel() < source.numel():
            self._record = torch.empty(source.numel(), dtype=torch.uint8)
        if not self._pieces:
            self._pieces = [torch.empty(self.piece, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        travelling: tuple[int, torch.Tensor, torch.cuda.Event | None] | None = None
        for number, start in enumerate(range(0, source.numel(), self.piece)):
            part = source[start : start + self.piece]
            piece = self._pieces[number % 2][: part.numel()]
            piece.copy_(part, non_blocking=pinned)
            event = mark() if mark else None
            self._land(travelling)
            travelling = (start, piece, event)
        self._land(travelling)
        return self._record.untyped_storage()

    def _land(self, travelling: tuple[int, torch.Tensor, torch.cuda.Event | None] | None) -> None:
        if travelling is None:
            return
        start, piece, event = travelling
        if event is not None:
            event.synchronize()
        self._record[start : start + piece.numel()] = piece


def write(file: DeferredFile, landing: Landing, wrote: Callable[[int], None] = lambda _: None) -> None:
    """Write a described file to its end and to the disk.

    Args:
        wrote: told the bytes of each record that is written.

    Raises:
        OSError, RuntimeError: it could not be written; torch's writer says no more than that.
    """
    # Opened here first: where a file system hangs, torch's writer would hold the interpreter's lock meanwhile.
    os.close(os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
    with serialization._open_zipfile_writer(str(file.path)) as archive:
        for name, content, size in file.records:
            held = landing.of(content, file.ready) if isinstance(content, torch.UntypedStorage) else content
            archive.write_record(name, held, size)  # without the interpreter's lock where it is a storage
            wrote(size)
    with open(file.path, "rb") as stream:
        os.fsync(stream.fileno())
