"""Promises of the memory figures of a process."""

import ctypes

from deepseek_sft.training import process_memory

MIB = 1 << 20


def test_resident_size_grows_with_what_is_touched():
    before = process_memory.resident()
    held = bytearray(b"x") * (64 * MIB)
    assert process_memory.resident() - before > 60 * MIB
    del held


def test_freed_memory_that_the_c_library_keeps_is_counted():
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before = process_memory.kept_by_allocator()
    blocks = [library.malloc(64 << 10) for _ in range(512)]  # below the size that goes back to the kernel at once
    held = process_memory.kept_by_allocator()
    for block in blocks[:-1]:  # the last one keeps those before it from being given back
        library.free(block)
    after = process_memory.kept_by_allocator()
    library.free(blocks[-1])
    assert held - before < 4 * MIB
    assert after - held > 28 * MIB
