"""Processes that end when we do, even when we are SIGKILLed: setpriv ties their lives to ours.

The kernel sends that signal when the *thread* that started a process ends, so one thread starts them
all, and lives as long as we do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cluster.tools import SEARCH_PATH, system_program

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")

DEADLINE_S = 20.0  # far above what anything here takes; only a hang meets it
POLL_S = 0.02
# setpriv comes too late if the parent has died before; the shell looks once more.
_IF_PARENT_LIVES = 'test "$PPID" = "$0" && exec "$@"'
LOG_TAIL_CHARS = 3000  # enough for a Go program's last words


_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="starter of programs")


class EndedError(Exception):
    """A process of the rig ended by itself; the message shows what it wrote last."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has taken so far."""

    cpu_s: float
    rss_mib: float


class Program:
    """One process, started now; its output goes to a file."""

    def __init__(
        self, name: str, command: Sequence[str | Path], *, log: Path, env: Mapping[str, str]
    ) -> None:
        self.name = name
        self._log = log
        self._process = _starter.submit(_start, command, log, env).result()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End it at once: its state is thrown away, and kube-apiserver takes 10 s to end well."""
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """Make it hang: connections stay open, nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def raise_if_ended(self) -> None:
        if (status := self._process.poll()) is not None:
            tail = self._log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
            raise EndedError(f"{self.name} ended with status {status}; {self._log}:\n{tail}")

    def usage(self) -> Usage:
        proc = Path("/proc", str(self.pid))
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # utime and stime: fields 14 and 15 of proc(5)
        pages = int((proc / "statm").read_text().split()[1])
        return Usage(
            cpu_s=ticks / os.sysconf("SC_CLK_TCK"),
            rss_mib=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        )


def _start(
    command: Sequence[str | Path], log: Path, env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    guard = (system_program("setpriv"), "--pdeathsig", "KILL", "--")
    with log.open("a") as output:
        return subprocess.Popen(
            [*guard, "sh", "-c", _IF_PARENT_LIVES, str(os.getpid()), *command],
            env={**os.environ, "PATH": SEARCH_PATH, **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the tests; they end it when its turn comes
        )


def until(holds: Callable[[], T], what: str, *, deadline_s: float = DEADLINE_S) -> T:
    """Poll a foreign process, which offers no event, until `holds` returns something true.

    Raises:
        TimeoutError: naming `what` was waited for and what was there last.
    """
    end_s = time.monotonic() + deadline_s
    while not (found := holds()):
        if time.monotonic() > end_s:
            raise TimeoutError(f"after {deadline_s:g} s still not: {what} (last: {found!r})")
        time.sleep(POLL_S)
    return found
