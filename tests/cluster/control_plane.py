"""Level A: a Kubernetes control plane of an ordinary user, on loopback, in about five seconds.

Everything in it is the real program with RBAC and admission on; only the state is thrown away. One
self-signed certificate serves as authority, as serving certificate and as the key that signs
ServiceAccount tokens: nothing here outlives a test run.
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from cluster.api import TIMEOUT_S, Api, ApiError
from cluster.programs import Program, Usage, until
from cluster.tools import system_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

POD_RANGE = "10.244.0.0/16"
SERVICE_RANGE = "10.96.0.0/16"
START_DEADLINE_S = 60.0  # 5 s on a quiet machine
SCHEDULER = "system:kube-scheduler"
CONTROLLERS = "system:kube-controller-manager"
GROUPS = {"admin": "system:masters", CONTROLLERS: "", SCHEDULER: "", "system:kube-proxy": "",
          "kwok": "system:masters", "kubelet": "system:masters"}  # fmt: skip
"""Who has a static token, and in which group."""
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system", "system:masters"]},
        {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
    ],
}
"""Who is written down: what tests bring, not the control plane's own parts."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the API server's audit log has it; a watch is there when it has ended."""

    verb: str
    group: str
    resource: str
    """With its subresource: `pods/status`; empty for a path that is no resource."""
    namespace: str
    name: str
    path: str
    status: int


class ControlPlane:
    """A running control plane; `start` makes one. Its files, logs among them, are in `directory`."""

    def __init__(self, bin_dir: Path, directory: Path) -> None:
        self.bin_dir = bin_dir
        self.directory = directory
        self.programs: dict[str, Program] = {}
        self._parts: set[str] = set()
        self._tokens = {user: secrets.token_hex(16) for user in GROUPS}
        self._etcd_port, self._peer_port, port = _free_ports(3)
        self.url = f"https://127.0.0.1:{port}"
        self._cert, self._key = directory / "server.crt", directory / "server.key"
        self._certify()
        self.kubeconfig = self.kubeconfig_of("admin")
        self.api = self.api_with(self._tokens["admin"])

    @classmethod
    @contextmanager
    def start(
        cls,
        bin_dir: Path,
        directory: Path,
        *,
        scheduler: bool = True,
        extenders: Sequence[Mapping[str, Any]] = (),
    ) -> Iterator[Self]:
        """Run a control plane that is ready for Deployments.

        Args:
            bin_dir: Where the programs are (`tools.programs()`).
            directory: For its files; empty.
            scheduler: Whether pods get nodes.
            extenders: Of the scheduler, as KubeSchedulerConfiguration has them.
        """
        plane = cls(bin_dir, directory)
        try:
            plane._start_etcd()
            plane.start_apiserver()
            plane._start_controllers()
            if scheduler:
                plane._start_scheduler(extenders)
            plane._until_usable("default")
            yield plane
        finally:
            plane.api.close()
            for program in reversed(plane.programs.values()):
                program.kill()
            shutil.rmtree(directory / "etcd", ignore_errors=True)  # 64 MB of empty log

    # Who may speak to it.

    def api_with(self, token: str, *, timeout_s: float = TIMEOUT_S) -> Api:
        """Return the API as the owner of the token sees it; `plane.api` is the administrator's."""
        return Api(self.url, ca_file=self._cert, token=token, timeout_s=timeout_s)

    def token_for(self, service_account: str) -> str:
        """Return a token as a pod of that ServiceAccount (NAMESPACE/NAME) gets it; an hour valid."""
        namespace, name = service_account.split("/")
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        answer = self.api.create(path, {"spec": {"expirationSeconds": 3600}})
        return str(answer["status"]["token"])

    def kubeconfig_for(self, service_account: str) -> Path:
        """Write a kubeconfig with a token of that ServiceAccount (NAMESPACE/NAME)."""
        return self._kubeconfig(service_account, self.token_for(service_account))

    def kubeconfig_of(self, user: str) -> Path:
        """Write a kubeconfig of one of the users in GROUPS."""
        return self._kubeconfig(user, self._tokens[user])

    # What is done to it.

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """Run kubectl as the administrator and return what it prints; its complaint is the error's."""
        done = subprocess.run(
            [self.bin_dir / "kubectl", f"--kubeconfig={self.kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise KubectlError(done.stderr.strip())
        return done.stdout

    def apply(
        self, manifests: str | Sequence[Mapping[str, Any]], *, namespace: str = "default"
    ) -> str:
        """Apply YAML, or objects, on the server's side."""
        if not isinstance(manifests, str):
            manifests = "\n---\n".join(json.dumps(manifest) for manifest in manifests)
        arguments = ("apply", "--server-side", f"--namespace={namespace}", "--filename=-")
        return self.kubectl(*arguments, stdin=manifests)

    def create_namespace(self, name: str) -> None:
        """Create a namespace and return when pods can be created in it."""
        self.api.create("/api/v1/namespaces", {"metadata": {"name": name}})
        self._until_usable(name)

    def stop_apiserver(self, *, hang: bool = False) -> None:
        """Let the API server vanish (connections are refused), or hang (nothing is answered)."""
        program = self.programs["kube-apiserver"]
        if hang:
            program.freeze()
        else:
            program.kill()

    def start_apiserver(self) -> None:
        """Start the API server, or end its outage: same address, same state, same certificate."""
        program = self.programs.get("kube-apiserver")
        if program is not None and program.runs:
            program.thaw()
        else:
            self._start_apiserver()
        self._until_answers("/readyz")

    def requests_of(self, service_account: str) -> list[Request]:
        """Return what that ServiceAccount (NAMESPACE/NAME) has asked so far, oldest first."""
        user = f"system:serviceaccount:{service_account.replace('/', ':')}"
        lines = (self.directory / "audit.log").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return [_request(entry) for entry in entries if entry["user"]["username"] == user]

    def usage(self) -> dict[str, Usage]:
        """Return what each running program has taken so far."""
        return {name: program.usage() for name, program in self.programs.items() if program.runs}

    def start_part(self, name: str, *arguments: str) -> None:
        """Start one of the programs in `bin_dir`; should it end by itself, waiting for others fails."""
        self.run(name, self.bin_dir / name, *arguments)
        self._parts.add(name)

    def run(self, name: str, *command: str | Path, **env: str) -> Program:
        """Start a program that ends with the control plane; its output goes to NAME.log."""
        log = self.directory / f"{name}.log"
        self.programs[name] = program = Program(name, command, log=log, env=env)
        return program

    # The programs.

    def _certify(self) -> None:
        names = "IP:127.0.0.1,DNS:localhost,DNS:kubernetes.default.svc"
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        subprocess.run(
            [system_program("openssl"), "req", "-x509", *curve, "-days", "2", "-subj", "/CN=rig",
             "-addext", f"subjectAltName={names}", "-keyout", self._key, "-out", self._cert],
            capture_output=True,
            check=True,
        )  # fmt: skip
        rows = [f'{self._tokens[user]},{user},{user},"{group}"' for user, group in GROUPS.items()]
        (self.directory / "tokens.csv").write_text("\n".join(rows))
        (self.directory / "audit.json").write_text(json.dumps(AUDIT))

    def _kubeconfig(self, user: str, token: str) -> Path:
        path = self.directory / f"{user.replace('/', '-').replace(':', '-')}.kubeconfig"
        cluster = {"server": self.url, "certificate-authority": str(self._cert)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "rig", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "rig", "context": {"cluster": "rig", "user": user}}],
            "current-context": "rig",
        }
        path.write_text(json.dumps(config))
        return path

    def _start_etcd(self) -> None:
        url = f"http://127.0.0.1:{self._etcd_port}"
        self.start_part(
            "etcd",
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            f"--listen-peer-urls=http://127.0.0.1:{self._peer_port}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )

    def _start_apiserver(self) -> None:
        self.start_part(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            f"--secure-port={self.url.rpartition(':')[2]}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",  # no loopback address may be an endpoint
            f"--tls-cert-file={self._cert}",
            f"--tls-private-key-file={self._key}",
            f"--token-auth-file={self.directory / 'tokens.csv'}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._cert}",
            f"--service-account-signing-key-file={self._key}",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            f"--audit-policy-file={self.directory / 'audit.json'}",
            f"--audit-log-path={self.directory / 'audit.log'}",
        )

    def _start_controllers(self) -> None:
        self.start_part(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig_of(CONTROLLERS)}",
            "--secure-port=0",
            "--leader-elect=false",
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={self._key}",
            f"--root-ca-file={self._cert}",
            f"--cluster-cidr={POD_RANGE}",
            "--allocate-node-cidrs=true",
            "--node-cidr-mask-size=24",
            "--kube-api-qps=1000",  # with the default the first ServiceAccount takes 5 s
            "--kube-api-burst=2000",
            f"--flex-volume-plugin-dir={self.directory / 'flex'}",  # or it makes one under /usr
        )

    def _start_scheduler(self, extenders: Sequence[Mapping[str, Any]]) -> None:
        config = self.directory / "scheduler.json"
        kubeconfig = str(self.kubeconfig_of(SCHEDULER))
        client = {"kubeconfig": kubeconfig, "qps": 1000, "burst": 2000}
        what = {
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            "leaderElection": {"leaderElect": False},
            "clientConnection": client,
            "extenders": list(extenders),
        }
        config.write_text(json.dumps(what))
        self.start_part(
            "kube-scheduler",
            f"--config={config}",
            "--secure-port=0",
        )

    def _until_usable(self, namespace: str) -> None:
        """Return when the namespace has its ServiceAccount: without, pods are refused."""
        self._until_answers(f"/api/v1/namespaces/{namespace}/serviceaccounts/default")

    def _until_answers(self, path: str) -> None:
        def answers() -> bool:
            for name in self._parts:
                self.programs[name].raise_if_ended()
            try:
                self.api.get(path)
            except (ApiError, OSError):
                return False
            return True

        until(answers, f"an answer on {path}", deadline_s=START_DEADLINE_S)


class KubectlError(Exception):
    """Kubectl failed; the message is what it said."""


def _request(entry: Mapping[str, Any]) -> Request:
    what = entry.get("objectRef", {})
    return Request(
        verb=entry["verb"],
        group=what.get("apiGroup", ""),
        resource="/".join(what[key] for key in ("resource", "subresource") if key in what),
        namespace=what.get("namespace", ""),
        name=what.get("name", ""),
        path=entry["requestURI"],
        status=entry["responseStatus"]["code"],
    )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
