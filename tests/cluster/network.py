"""A private network for the whole test process: the ground on which fake pods get real addresses.

Pod and Service addresses must be reachable by everything a test starts (engines, Envoy, load, the
operator) and by the test itself, without root. Linux gives that to an ordinary user in a network
namespace of its own, and a process may move into one. So the process moves, instead of starting a
second pytest inside and relaying its reports: one command, one summary, a debugger works, and what is
started later is inside by itself. It happens after collection, and only when a selected test asks
for a cluster. There is no way back, hence the trial run in a child first: a kernel may grant the
namespace and refuse everything in it. An ordinary user needs a user namespace as well, in which only
a process with a single thread may move: it forks, and the tests go on in the child.

Inside, the whole pod range is local (AnyIP): any process may listen on any pod's address. A bridge
without ports carries the node's address and the default route that kube-proxy wants.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import warnings
from pathlib import Path

from cluster.control_plane import POD_RANGE
from cluster.tools import UnavailableError, system_program

NODE_ADDRESS = "10.250.0.1"

_SETUP = (
    "link set lo up",
    f"route add local {POD_RANGE} dev lo",
    "link add node0 type bridge",
    f"addr add {NODE_ADDRESS}/24 dev node0",
    "link set node0 up",
    "route add default dev node0",
)
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def enter() -> None:
    """Move this process into a network namespace of its own; once there, do nothing.

    As an ordinary user it returns in a child, for which this process only waits.

    Raises:
        UnavailableError: it cannot be had; nothing has changed.
    """
    if _inside():
        return
    as_root = os.geteuid() == 0
    _try_in_child(as_root=as_root)
    if as_root:
        _unshare(_CLONE_NEWNET)
    else:
        uid, gid = os.geteuid(), os.getegid()
        _continue_in_child()
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        proc = Path("/proc/self")
        (proc / "setgroups").write_text("deny")
        (proc / "uid_map").write_text(f"0 {uid} 1")
        (proc / "gid_map").write_text(f"0 {gid} 1")
    for arguments in _SETUP:
        subprocess.run([system_program("ip"), *arguments.split()], check=True)


def _unshare(flags: int) -> None:
    if _libc.unshare(flags):
        raise UnavailableError(f"no private network: {os.strerror(ctypes.get_errno())}")


def _continue_in_child() -> None:
    """Fork, and wait in the parent: a child has one thread, whatever libraries have started here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: for having threads
        child = os.fork()
    if child == 0:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child as well
    signal.signal(signal.SIGTERM, lambda signum, _: os.kill(child, signum))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)  # as a shell tells of a signal


def _inside() -> bool:
    done = subprocess.run(
        [system_program("ip"), "-brief", "address", "show", "dev", "node0"],
        capture_output=True,
        text=True,
        check=False,
    )
    return NODE_ADDRESS in done.stdout


def _try_in_child(*, as_root: bool) -> None:
    ip, unshare = system_program("ip"), system_program("unshare")
    user = [] if as_root else ["--user", "--map-root-user"]
    command: list[str | Path] = [unshare, "--net", *user, ip, "link", "set", "lo", "up"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"no private network: {done.stderr.strip()}")
