"""enter.py HOSTNAME PID COMMAND...: run COMMAND inside the namespaces of process PID, as a shell would run it.

Keeps folder and environment; leaves with the command's exit code, or 128 + the signal that ended it.

Why not nsenter: it dies of the first Ctrl-C while the command still cleans up behind the prompt. Here the command has
a process group of its own, so a signal reaches it exactly once: Ctrl-C goes to our group and is passed on; only a
command that reads from the terminal is given the terminal, and then gets Ctrl-C from there.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

SIGNALS_OF_TERMINAL = {signal.SIGINT, signal.SIGQUIT, signal.SIGHUP}  # meant for a whole process group
SIGNALS_OF_PROCESS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
WATCHED = SIGNALS_OF_TERMINAL | SIGNALS_OF_PROCESS | {signal.SIGCHLD, signal.SIGTSTP}
SENT_BY_KERNEL = 0x80  # si_code of a signal made by a key press


def fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def enter_namespaces(pid: int, hostname: str) -> None:
    """Join the namespaces of ``pid``; the process namespace counts for children only."""
    setns = ctypes.CDLL(None, use_errno=True).setns
    folder = Path.cwd()
    names = ["user", "mnt", "net", "uts", "ipc", "pid"]  # the user namespace first: it gives the right to the others
    handles = [(name, os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)) for name in names]
    for name, handle in handles:
        if name == "user" and os.fstat(handle).st_ino == Path("/proc/self/ns/user").stat().st_ino:
            continue  # joining one's own is an error
        if setns(handle, 0) != 0:
            fail(f"cannot join the {name} namespace of {hostname}: {os.strerror(ctypes.get_errno())}", 1)
    try:
        os.chdir(folder)
    except OSError:
        fail(f"{folder} does not exist on {hostname}\n  fix: start the cluster with --share {folder}", 2)


def start(command: list[str]) -> int:
    """Start the command in a process group of its own, with the default actions for signals."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        for number in (*WATCHED, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            fail(f"{command[0]}: {error.strerror}", 127 if isinstance(error, FileNotFoundError) else 126)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # whoever comes first
    return child


class Terminal:
    """The controlling terminal, lent to the command only when it asks for it by reading."""

    def __init__(self) -> None:
        self.lent = False
        try:
            self.handle = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self.handle = -1

    def lend(self, group: int) -> bool:
        with contextlib.suppress(OSError):
            if self.handle >= 0 and os.tcgetpgrp(self.handle) == os.getpgrp():
                os.tcsetpgrp(self.handle, group)
                self.lent = True
                return True
        return False

    def take_back(self) -> None:
        if self.lent:
            with contextlib.suppress(OSError):
                os.tcsetpgrp(self.handle, os.getpgrp())
        self.lent = False


def stop_together(child: int, reason: int, terminal: Terminal) -> None:
    """The command has stopped (Ctrl-Z, or it wants the terminal): stop too, and go on with it."""
    wants_terminal = reason in (signal.SIGTTIN, signal.SIGTTOU)
    if not (wants_terminal and terminal.lend(child)):
        again = terminal.lent or wants_terminal
        terminal.take_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        if again:
            terminal.lend(child)
    os.killpg(child, signal.SIGCONT)


def wait(child: int, terminal: Terminal, ignored: set[int]) -> int:
    """Pass signals on until the command ends; returns its exit code."""
    while True:
        info = signal.sigwaitinfo(WATCHED)
        number = info.si_signo
        if number == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                stop_together(child, os.WSTOPSIG(status), terminal)
            elif pid:
                return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        elif number in ignored and info.si_code == SENT_BY_KERNEL:
            continue  # started with & by a script: a key press is not for us
        else:
            with contextlib.suppress(ProcessLookupError):
                (os.kill if number in SIGNALS_OF_PROCESS else os.killpg)(child, number)


def main() -> int:
    hostname, pid, command = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    ignored = {number for number in SIGNALS_OF_TERMINAL if signal.getsignal(number) == signal.SIG_IGN}
    # SIGTTOU blocked: taking the terminal back from the background would stop us.
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED | {signal.SIGTTOU})
    terminal = Terminal()
    try:
        enter_namespaces(pid, hostname)
    except FileNotFoundError:
        fail(f"{hostname} has just died", 1)
    child = start(command)
    try:
        return wait(child, terminal, ignored)
    finally:
        terminal.take_back()


if __name__ == "__main__":
    sys.exit(main())
