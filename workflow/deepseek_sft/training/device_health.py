"""Clocks, reasons for throttling, ECC errors and Xid events of one GPU, while it trains.

Through NVML where the environment has ``pynvml`` (package nvidia-ml-py), else from nvidia-smi, which knows no Xid
events. A thread looks every few seconds, since a GPU that has just ended its step is idle and tells other clocks.
"""

import contextlib
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

EVERY_S = {"NVML": 5.0, "nvidia-smi": 60.0}  # a process for each look is dearer
REASONS = {  # bits of nvmlClocksEventReasons that slow a busy GPU down (nvml.h)
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, by software",
    0x40: "thermal, by hardware",
    0x80: "power brake",
}
IDLE = 0x1
XID = 0x8  # nvmlEventTypeXidCriticalError
FIELDS = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks_throttle_reasons.active",
    "ecc.errors.corrected.volatile.total",
    "ecc.errors.uncorrected.volatile.total",
)


@dataclass(frozen=True)
class Health:
    """What was seen of a GPU since the last question; -1 where it is not told.

    Attributes:
        clock_mhz: lowest SM clock seen while busy; of ``most_mhz``.
        reasons: bits of ``REASONS`` that were set at any look.
        corrected, uncorrected: ECC errors since the driver's last reset.
        xid: Xid events since the start.
    """

    clock_mhz: float = -1
    most_mhz: float = -1
    reasons: int = 0
    corrected: float = -1
    uncorrected: float = -1
    xid: float = -1

    def and_then(self, later: "Health") -> "Health":
        """Both looks together."""
        clocks = [one.clock_mhz for one in (self, later) if one.clock_mhz > 0]
        return replace(later, clock_mhz=min(clocks, default=-1), reasons=self.reasons | later.reasons)


def words(reasons: int) -> list[str]:
    """Names of the reasons for throttling."""
    return [name for bit, name in REASONS.items() if reasons & bit]


def look_with_nvml(pynvml: Any, uuid: str) -> Callable[[], Health]:
    """A function that asks NVML; raises ``pynvml.NVMLError`` where it cannot be used."""
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    reasons = getattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or (
        pynvml.nvmlDeviceGetCurrentClocksThrottleReasons
    )
    events, seen = None, [0]
    with contextlib.suppress(pynvml.NVMLError):  # not in every container
        events = pynvml.nvmlEventSetCreate()
        pynvml.nvmlDeviceRegisterEvents(gpu, XID, events)

    def told(ask: Callable[..., Any], *arguments: Any) -> float:
        try:
            return ask(*arguments)
        except pynvml.NVMLError:  # GPUs without ECC, and the like
            return -1

    def look() -> Health:
        bits = int(max(0, told(reasons, gpu)))
        while events is not None:
            try:
                pynvml.nvmlEventSetWait_v2(events, 0)
            except pynvml.NVMLError:  # a time-out: nothing has happened
                break
            seen[0] += 1
        return Health(
            -1 if bits & IDLE else told(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_SM),
            told(pynvml.nvmlDeviceGetMaxClockInfo, gpu, pynvml.NVML_CLOCK_SM),
            bits & sum(REASONS),
            told(pynvml.nvmlDeviceGetTotalEccErrors, gpu, 0, 0),
            told(pynvml.nvmlDeviceGetTotalEccErrors, gpu, 1, 0),
            -1 if events is None else seen[0],
        )

    return look


def parse(line: str) -> Health:
    """One line of ``nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits``."""
    cells = [cell.strip() for cell in line.split(",")]

    def number(text: str) -> float:
        try:
            return float(int(text, 16) if text.startswith("0x") else float(text))
        except ValueError:  # [N/A]
            return -1

    clock, most, reasons, corrected, uncorrected = (number(cell) for cell in cells)
    bits = int(max(0, reasons))
    return Health(-1 if bits & IDLE else clock, most, bits & sum(REASONS), corrected, uncorrected)


def look_with_nvidia_smi(uuid: str) -> Health:
    """Raises OSError or ValueError where nvidia-smi does not answer as it should."""
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except subprocess.SubprocessError as error:
        raise OSError(str(error)) from None
    return parse(done.stdout.strip().splitlines()[0])


class Observer:
    """Looks at one GPU from a thread until ``close``.

    Attributes:
        source: ``NVML``, ``nvidia-smi``, or empty where neither answers; ``why`` says so then.
    """

    def __init__(self, uuid: str, every: float | None = None):
        self.source, self.why, self._look = self._choose(uuid)
        self._seen: Health | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        if self._look is not None:
            seconds = every or EVERY_S[self.source]
            threading.Thread(target=self._run, args=(seconds,), name="device health", daemon=True).start()

    @staticmethod
    def _choose(uuid: str) -> tuple[str, str, Callable[[], Health] | None]:
        reasons = []
        try:
            import pynvml

            look = look_with_nvml(pynvml, uuid)
            look()
            return "NVML", "", look
        except ImportError:
            reasons.append("no pynvml (nvidia-ml-py)")
        except Exception as error:  # NVMLError is known only where the package is
            reasons.append(f"NVML: {error}")
        try:
            look_with_nvidia_smi(uuid)
            return "nvidia-smi", "; ".join(reasons), lambda: look_with_nvidia_smi(uuid)
        except (OSError, ValueError) as error:
            return "", "; ".join([*reasons, f"nvidia-smi: {error}"]), None

    def _run(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            with contextlib.suppress(Exception):  # a look that fails is left out; the next one may not
                found = self._look()
                with self._lock:
                    self._seen = found if self._seen is None else self._seen.and_then(found)

    def take(self) -> Health:
        """What was seen since the last call; all -1 where nothing was."""
        with self._lock:
            found, self._seen = self._seen, None
        return found or Health()

    def close(self) -> None:
        self._closed.set()
