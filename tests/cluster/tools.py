"""The programs that the rig starts: where they are, and what to do where they are not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
FAKE_NODES = ("kwok", "kube-proxy")
SEARCH_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
"""Where Debian keeps ip and nft, which an ordinary user's PATH lacks."""
PACKAGES = {"ip": "iproute2", "nft": "nftables", "setpriv": "util-linux", "unshare": "util-linux"}
"""Debian's, where they are not called as the program."""

_BUILD = Path(__file__).parent / "tools" / "build.sh"


class UnavailableError(Exception):
    """This machine cannot run the rig; the message says why and what helps."""


def programs() -> Path:
    """Return the directory of the Kubernetes programs: KUBEBUILDER_ASSETS, or the cache.

    Raises:
        UnavailableError: one is missing.
    """
    where = subprocess.run([_BUILD, "--where"], capture_output=True, text=True, check=True)
    directory = Path(where.stdout.strip())
    missing = [
        name for name in CONTROL_PLANE + FAKE_NODES if not os.access(directory / name, os.X_OK)
    ]
    if missing:
        raise UnavailableError(
            f"no {', '.join(missing)} in {directory}: `make cluster-tools` builds what is missing"
        )
    for name in ("openssl", "setpriv"):
        system_program(name)
    return directory


def system_program(name: str) -> Path:
    """Return the path of a program that the system's packages bring.

    Raises:
        UnavailableError: it is not installed.
    """
    found = shutil.which(name, path=SEARCH_PATH)
    if found is None:
        raise UnavailableError(f"no `{name}` here: install {PACKAGES.get(name, name)}")
    return Path(found)
