"""Build one locked environment, or find that it is there already.

`.envs/NAME` becomes a link to a virtual environment named by the hash of its lock files, in the store ($ENVS_CACHE,
default .envs/store). A build that was interrupted is started again; two builders of the same environment wait for each
other. Uses the standard library alone, since it also builds the workflow's own environment.

    build_env.py train                        builds .envs/train
    build_env.py --download wheels train      only collects everything that it takes, as wheels, in the folder wheels
    build_env.py --wheelhouse wheels train    builds it from that folder alone: no network
    build_env.py --archive tar train          also packs it into one file, .envs/train.tar
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, files, local_copies, locks
from deepseek_sft.errors import BadInputError, CrashError

PROJECT = Path(__file__).resolve().parents[2]


def find_uv() -> str | None:
    """uv from the workflow environment or the PATH."""
    own = PROJECT / ".envs" / "workflow" / "bin" / "uv"
    return str(own) if own.exists() else shutil.which("uv")


def pip_settings(python: str) -> dict[str, str]:
    """What pip is configured with (indexes, find-links), which uv does not read by itself."""
    command = [python, "-m", "pip", "config", "list"]
    settings = {}
    for line in subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines():
        key, _, value = line.partition("=")
        settings.setdefault(key.rsplit(".", 1)[-1], value.strip("'\""))
    return settings


def uv_environment(python: str) -> dict[str, str]:
    """uv's variables for pip's index-url, extra-index-url, find-links and certificate, unless set already.

    A folder index (file://) is left out: uv would take it as the only source of the packages it lists.
    """
    settings = pip_settings(python)
    wanted = {
        "UV_DEFAULT_INDEX": settings.get("index-url", ""),
        "UV_INDEX": " ".join(u for u in settings.get("extra-index-url", "").split() if not u.startswith("file:")),
        "UV_FIND_LINKS": ",".join(settings.get("find-links", "").split()),
        "SSL_CERT_FILE": settings.get("cert", ""),
    }
    return {key: value for key, value in wanted.items() if value and key not in os.environ}


def install(folder: Path, name: str, wheelhouse: Path | None) -> None:
    """Create the virtual environment and install the locks into it."""
    run([sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    uv = find_uv()
    environment, fix = dict(os.environ), INDEXES + (OF_TORCH if name in OF_CPU else "")
    if uv:
        environment |= uv_environment(sys.executable)
        base = [uv, "pip", "install", "--quiet", "--python", python, "--compile-bytecode"]
    else:
        base = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # pip would not compile: each start then costs 10 to 20 s
    if wheelhouse:
        base += ["--no-index", "--find-links", str(wheelhouse.resolve())]
        again = f"build_env.py --download {wheelhouse} {name}"
        fix = (
            f"read its message above; packages come from {wheelhouse} alone: complete it where there is a network, "
            f"with the same Python and system, by `{again}`"
        )
    for file, options in requirement_files(name):
        if wheelhouse and (wheelhouse / file.name).exists():
            file = wheelhouse / file.name  # the lock with the hashes of wheels that were built from sources as well
        run([*base, *options, "--require-hashes", "-r", str(file)], environment, fix)
    shim = locks.FOLDER / "shims" / name
    if shim.exists():
        copy = folder / "shim"  # building writes beside the sources, and the checkout may be read-only
        shutil.copytree(shim, copy, ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
        run([*base, "--no-deps", "--no-build-isolation", str(copy)], environment, fix)
    for program in locks.programs(name):
        place = folder / "bin" / program.name
        place.unlink(missing_ok=True)  # uv may have linked a package's program to its cache
        place.write_text(program.read_text(encoding="utf-8").replace("#!python", f"#!{python}", 1), encoding="utf-8")
        place.chmod(0o755)


INDEXES = "read its message above; packages come from the indexes that pip is configured with"
OF_CPU = ("train", "serve-cpu")
OF_TORCH = (
    "; this lock holds torch's CPU build (2.13.0+cpu), which needs an index or a find-links folder that offers it "
    "(pip's extra-index-url, see pytorch.org): with the CUDA build alone it cannot be installed"
)


def run(command: list[str], environment: dict[str, str] | None = None, fix: str = INDEXES) -> None:
    """Run a command with its output on standard error; its failure is ours."""
    code = subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode
    if code:
        raise CrashError(f"`{' '.join(command)}` failed with exit code {code}", fix)


def requirement_files(name: str) -> list[tuple[Path, list[str]]]:
    """The lock files of an environment, each with the options that it is installed with."""
    without = locks.FOLDER / f"{name}.no-deps.txt"
    return [(locks.FOLDER / f"{name}.txt", []), *([(without, ["--no-deps"])] if without.exists() else [])]


def with_wheels(lock: Path, folder: Path) -> str:
    """The lock's text with the hashes of the wheels in ``folder`` added, since one built from sources has its own.

    Each was made from a file whose hash the lock has.
    """
    hashes: dict[str, list[str]] = {}
    for wheel in sorted(folder.glob("*.whl")):
        distribution = wheel.name.split("-")[0].replace("_", "-").replace(".", "-").lower()
        hashes.setdefault(distribution, []).append(hashlib.sha256(wheel.read_bytes()).hexdigest())
    lines = []
    for line in lock.read_text(encoding="utf-8").splitlines():
        lines.append(line)
        if line[:1].isalnum() and line.endswith("\\"):
            found = hashes.get(line.split("==")[0].replace("_", "-").replace(".", "-").lower(), [])
            lines += [f"    --hash=sha256:{value} \\" for value in found]
    return "\n".join(lines) + "\n"


def download(name: str, folder: Path) -> None:
    """Collect every package of an environment as a wheel, those included that indexes have as sources only."""
    locks.lock_files(name)  # an unknown name is told here
    folder.mkdir(parents=True, exist_ok=True)
    for file, options in requirement_files(name):
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--wheel-dir", str(folder), "--require-hashes"]
        run([*command, *options, "-r", str(file)])
        files.write_text(folder / file.name, with_wheels(file, folder))
    count = len(list(folder.glob("*.whl")))
    cli.say(f"environment {name}: {count} wheels in {folder}; install with --wheelhouse, same Python and system")


def build(name: str, store: Path, wheelhouse: Path | None) -> Path:
    """Build environment ``name`` in ``store`` unless it is complete there; returns its folder."""
    os.umask(os.umask(0) & 0o722)  # who shares the checkout shares its environments; nothing in them is secret
    store.mkdir(parents=True, exist_ok=True)
    folder = store / f"{name}-{locks.lock_hash(name)}"
    complete = folder / "complete.json"
    with open(store / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if complete.exists():
            cli.say(f"environment {name}: {folder.name} is there")
            return folder
        cli.say(f"environment {name}: building {folder.name}")
        shutil.rmtree(folder, ignore_errors=True)
        install(folder, name, wheelhouse)
        files.write_json(complete, {"name": name, "locks": [p.name for p in locks.lock_files(name)]})
    return folder


def linked(name: str) -> Path | None:
    """The environment that `.envs/NAME` points at, if it is complete and of the present lock, in whichever store."""
    place = PROJECT / ".envs" / name
    folder = place.resolve()
    current = folder.name == f"{name}-{locks.lock_hash(name)}" and (folder / "complete.json").exists()
    return folder if place.is_symlink() and current else None


def archive(name: str, folder: Path, kind: str) -> None:
    """Pack a built environment into one file beside it, unless it is there, and link `.envs/NAME.<kind>` to it.

    Raises:
        BadInputError: the program that packs it is not here.
    """
    packed = folder.with_name(f"{folder.name}.{kind}")
    partial = packed.with_name(f".{packed.name}.{os.getpid()}")
    commands = {
        "tar": ["tar", "--create", "--file", str(partial), "--directory", str(folder), "."],
        "squashfs": ["mksquashfs", str(folder), str(partial), "-quiet", "-no-progress", "-all-root"],
    }
    if not packed.exists():
        if not shutil.which(commands[kind][0]):
            raise BadInputError(
                f"{commands[kind][0]} is not here", "install squashfs-tools, or set envs.local.train: tar"
            )
        cli.say(f"environment {name}: packing {packed.name}")
        try:
            run(commands[kind], fix="see above; the archive takes as much space as the environment at most")
            os.replace(partial, packed)
        finally:
            partial.unlink(missing_ok=True)
    link(f"{name}.{kind}", packed)


def link(name: str, folder: Path) -> None:
    """Point `.envs/NAME` at ``folder``, atomically."""
    place = PROJECT / ".envs" / name
    place.parent.mkdir(exist_ok=True)
    temporary = place.with_name(f".{name}.{os.getpid()}")
    temporary.symlink_to(folder)
    os.replace(temporary, place)


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("name", help="environment: a lock file envs/NAME.txt")
    parser.add_argument("--store", type=Path, help="folder of built environments; default $ENVS_CACHE or .envs/store")
    parser.add_argument("--wheelhouse", type=Path, help="install from this folder of wheels only (no network)")
    parser.add_argument("--download", type=Path, metavar="FOLDER", help="collect its wheels in FOLDER, build nothing")
    parser.add_argument(
        "--archive", choices=local_copies.KINDS, help="also make .envs/NAME.<this> for the nodes' own disks"
    )
    parser.add_argument("--marker", type=Path, help="write what was built to this file (JSON)")
    arguments = parser.parse_args()
    if sys.version_info[:2] != (3, 11):
        raise BadInputError(f"the locks are for Python 3.11, this is {sys.version.split()[0]}", "run with python3.11")
    if arguments.download:
        download(arguments.name, arguments.download)
        return
    if arguments.wheelhouse and not arguments.wheelhouse.is_dir():
        again = f"make it where there is a network: build_env.py --download {arguments.wheelhouse} {arguments.name}"
        raise BadInputError(f"--wheelhouse {arguments.wheelhouse} does not exist", again)
    store = arguments.store or Path(os.environ.get("ENVS_CACHE") or PROJECT / ".envs" / "store")
    try:
        folder = linked(arguments.name)
        if folder is None or arguments.store:
            folder = build(arguments.name, store.resolve(), arguments.wheelhouse)
            link(arguments.name, folder)
        if arguments.archive:
            archive(arguments.name, folder, arguments.archive)
        if arguments.marker:
            files.write_json(arguments.marker, {"environment": arguments.name, "folder": folder.name})
    except PermissionError as error:
        raise BadInputError(
            f"environment {arguments.name}: {error.filename}: {error.strerror}; another user has made it for himself",
            "let its owner open it (chmod -R go+rX, also the folders above it and its Python's), or build your own "
            "in a clone of your own",
        ) from None


if __name__ == "__main__":
    cli.run(main)
