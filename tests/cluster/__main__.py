"""`python -m cluster`: a cluster with fake nodes, and a shell in which kubectl knows it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster import network
from cluster.control_plane import ControlPlane
from cluster.fake_nodes import Cluster
from cluster.tools import UnavailableError, programs


def main() -> None:
    """Run the command given, or a shell, inside a new cluster; the cluster ends with it."""
    began_s = time.monotonic()
    try:
        bin_dir = programs()
        network.enter()
    except UnavailableError as error:
        sys.exit(str(error))
    with (
        tempfile.TemporaryDirectory(prefix="cluster-") as directory,
        ControlPlane.start(bin_dir, Path(directory)) as plane,
        Cluster.start(plane),
    ):
        sys.stderr.write(
            f"{plane.url} after {time.monotonic() - began_s:.1f} s, files in {directory}\n"
        )
        path = f"{bin_dir}:{os.environ['PATH']}"
        env = {**os.environ, "KUBECONFIG": str(plane.kubeconfig), "PATH": path}
        command = sys.argv[1:] or [os.environ.get("SHELL", "/bin/sh")]
        status = subprocess.run(command, env=env, check=False).returncode
    sys.exit(status)


if __name__ == "__main__":
    main()
