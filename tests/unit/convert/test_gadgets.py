"""Whatever a checkpoint's pickle asks for is not done: at resume as at conversion."""

import io
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import stored_checkpoint as stored

from deepseek_sft.convert import rank_state, zero
from deepseek_sft.errors import BadInputError
from deepseek_sft.training import checkpoints


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, *arguments: str) -> bytes:
    """Pickle text that calls ``module.name`` with texts and drops what it gives."""
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(map(text, arguments)) + b"tR0"


def stacked(module: str, name: str, argument: str) -> bytes:
    """The same in the words of protocol 4."""
    return text(module) + text(name) + b"\x93" + text(argument) + b"\x85R0"


CANARY = "CANARY"  # replaced by the path
TOUCH = f"touch {CANARY}"
OPEN = f"open({CANARY!r}, 'w')"
GADGETS = {
    **{f"{module}.system": call(module, "system", TOUCH) for module in ("os", "posix", "nt")},
    "os.popen": call("os", "popen", TOUCH),
    "os.execl": call("os", "execlp", "touch", "touch", CANARY),
    "os.mkdir": call("os", "mkdir", CANARY),
    "pathlib": call("pathlib", "Path", CANARY),
    **{f"subprocess.{name}": call("subprocess", name, f"touch {CANARY}") for name in ("getoutput", "Popen", "run")},
    **{
        f"{module}.{name}": call(module, name, OPEN)
        for module in ("builtins", "__builtin__")
        for name in ("eval", "exec")
    },
    "builtins.open": call("builtins", "open", CANARY, "w"),
    "builtins.getattr": b"cbuiltins\ngetattr\n(cos\npath\n" + text("join") + b"tR0",
    "builtins.__import__": call("builtins", "__import__", "antigravity"),
    "importlib": call("importlib", "import_module", "antigravity"),
    "runpy": call("runpy", "run_path", CANARY),
    "shutil": call("shutil", "copy", "/etc/hostname", CANARY),
    "torch.hub": call("torch.hub", "load", "a/b", "c"),
    "torch.load": call("torch", "load", CANARY),
    "torch dotted": call("torch", "os.system", TOUCH),
    "torch.serialization dotted": call("torch.serialization", "os.system", TOUCH),
    "numpy.load": call("numpy", "load", CANARY),
    "numpy runstring": call("numpy.testing._private.utils", "runstring", OPEN, "{}"),
    "numpy fromfile": call("numpy", "fromfile", CANARY),
    "codecs.open": call("codecs", "open", CANARY, "w"),
    "ctypes": call("ctypes", "CDLL", "libc.so.6"),
    "protocol 4": stacked("os", "system", TOUCH),
    "protocol 4 dotted": stacked("torch", "os.system", TOUCH),
    "INST": b"(" + text(TOUCH) + b"ios\nsystem\n0",
    "OBJ": b"(cos\nsystem\n" + text(TOUCH) + b"o0",
    "NEWOBJ": b"csubprocess\nPopen\n(" + text(TOUCH) + b"t\x810",
    "BUILD": b"ctorch\nThing\n)R}" + text("__class__") + b"cos\nsystem\nsb0",
    "extension registry": b"\x82\x010",
    "deep": b"(" * 100_000 + b"t" * 100_000 + b"0",
    "a memo of gigabytes": b"Kar\xff\xff\xff\x7f0",
    "bytes of exabytes": b"\x8e" + struct.pack("<Q", 1 << 62) + b"x0",
}


def plant(file: Path, gadget: bytes, canary: Path) -> None:
    """Put the gadget in front of a file's pickle, and have the marker know the new size."""
    grown = gadget
    for word in (TOUCH, OPEN, CANARY):
        old = text(word)
        grown = grown.replace(old, text(word.replace(CANARY, str(canary))))
    made = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(made, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = content[:2] + grown + content[2:]
            target.writestr(entry.filename, content)
    file.write_bytes(made.getvalue())
    stored.change_marker(file.parent, lambda marker: marker["files"].update({file.name: file.stat().st_size}))


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(stored.STORED / f"step_{stored.STEP}", tmp_path / f"step_{stored.STEP}")


# Objects of these stay what they are, a name: the file's tensors are read, nothing is called.
INERT = ("pathlib", "torch", "numpy", "protocol 4 dotted", "deep")


def refused(read, *arguments) -> bool:
    try:
        read(*arguments)
    except BadInputError as error:
        assert "_states.pt" in error.problem
        return True
    return False


@pytest.mark.parametrize("kind", [stored.optimizer, stored.model], ids=["optimizer", "model"])
@pytest.mark.parametrize("name", GADGETS)
def test_no_gadget_is_run_when_training_resumes_or_the_checkpoint_is_converted(folder, name, kind, tmp_path):
    canary, file = tmp_path / "canary", kind(folder, 0)
    digests = rank_state.digests_of(folder, [file.name])
    plant(file, GADGETS[name], canary)
    marker = checkpoints.judge(folder, stored.EXPECTED["run_id"]).marker
    expected = not name.startswith(INERT)
    assert refused(rank_state.read, folder, 0, marker) is expected
    assert refused(zero.open_checkpoint, folder) is expected
    assert refused(rank_state.read, folder, 0, marker | {"checksums": digests}), "it is not the file that was committed"
    assert not canary.exists()
