"""Commands, as a thin table: what a command needs is imported when it runs, so that help is quick.

What the user can mend is told in one line on stderr: exit code 2 for what was written wrongly, 1
for what could not be started.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Any

import click

from trimtab import __version__
from trimtab.ports import ConfigurationError, TrimtabError


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TrimtabError as error:
            click.echo(f"trimtab: {error}", err=True)
            ctx.exit(2 if isinstance(error, ConfigurationError) else 1)


class _Address(click.ParamType[tuple[str, int]]):
    """HOST:PORT with an IP address; IPv6 in brackets."""

    name = "host:port"

    def __init__(self, *, names_too: bool = False) -> None:
        self._names_too = names_too

    def convert(
        self,
        value: str | tuple[str, int],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(?:\[([^][]+)\]|([^][:]+)):([0-9]{1,5})", value)
        if match is None or int(match[3]) > 65_535:  # noqa: PLR2004  # the largest there is
            self.fail(f"{value!r} is not like 127.0.0.1:8000 or [::1]:8000", param, ctx)
        host = match[1] or match[2]
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if not self._names_too:
                self.fail(f"{host!r} is not an IP address", param, ctx)
        return host, int(match[3])


_listen = click.option(
    "--listen",
    type=_Address(),
    default="127.0.0.1:8000",
    show_default=True,
    help="Where Envoy takes requests; every address: 0.0.0.0:8000.",
)
_admin_port = click.option(
    "--envoy-admin-port",
    type=click.IntRange(1, 65_535),
    default=9901,
    show_default=True,
    help="Envoy's own interface, on loopback.",
)
_log_level = click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    envvar="TRIMTAB_LOG_LEVEL",
    show_default=True,
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trimtab", message="%(prog)s %(version)s")
def main() -> None:
    """Balance LLM fleets by the tokens of work that each pod still owes."""
    # gRPC would say on stderr, in its own form, what we tell ourselves; it looks once, when loaded.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@main.command()
@click.argument("fleet", type=click.Path(path_type=Path))
@_listen
@click.option(
    "--xds",
    type=_Address(),
    default="127.0.0.1:18000",
    show_default=True,
    help="Where Envoys are told weights.",
)
@click.option(
    "--telemetry",
    type=_Address(),
    default="127.0.0.1:8081",
    show_default=True,
    help="Where /metrics, /healthz and /readyz are.",
)
@click.option(
    "--picker",
    type=_Address(),
    default="127.0.0.1:9001",
    show_default=True,
    help="Where the picker is asked by Envoy.",
)
@click.option(
    "--picker-telemetry",
    type=_Address(),
    default="127.0.0.1:8082",
    show_default=True,
    help="Where the picker's /metrics and /debug/decisions are.",
)
@click.option("--no-envoy", is_flag=True, help="Only serve xDS, and print the bootstrap to use.")
@click.option(
    "--envoy",
    type=click.Path(path_type=Path),
    help="Envoy to start.  [default: the one that pip installed, or the PATH's]",
)
@_admin_port
@_log_level
def standalone(
    *,
    fleet: Path,
    listen: tuple[str, int],
    xds: tuple[str, int],
    telemetry: tuple[str, int],
    picker: tuple[str, int],
    picker_telemetry: tuple[str, int],
    no_envoy: bool,
    envoy: Path | None,
    envoy_admin_port: int,
    log_level: str,
) -> None:
    """Balance the pools of a file.

    The file is read again when it changes; docs/examples/fleet.yaml shows all of its fields.
    """
    from trimtab import app  # noqa: PLC0415  # help is quick

    options = app.Standalone(
        fleet=fleet,
        listen=listen,
        xds=xds,
        telemetry=telemetry,
        picker=picker,
        picker_telemetry=picker_telemetry,
        admin_port=envoy_admin_port,
        start_envoy=not no_envoy,
        envoy=envoy,
    )
    app.run(app.standalone(options), log_level=log_level)


@main.command()
@click.option(
    "--xds",
    type=_Address(),
    default="0.0.0.0:18000",
    envvar="TRIMTAB_XDS",
    show_default=True,
    show_envvar=True,
    help="Where Envoys are told weights.",
)
@click.option(
    "--telemetry",
    type=_Address(),
    default="0.0.0.0:8081",
    envvar="TRIMTAB_TELEMETRY",
    show_default=True,
    show_envvar=True,
    help="Where /metrics, /healthz and /readyz are.",
)
@click.option(
    "--watch-namespace",
    default="",
    envvar="TRIMTAB_WATCH_NAMESPACE",
    show_envvar=True,
    help="Serve the pools of this namespace only.  [default: of all]",
)
@click.option(
    "--pod-selector",
    default="",
    envvar="TRIMTAB_POD_SELECTOR",
    show_envvar=True,
    help="Look only at pods with these labels, written as for kubectl -l.  [default: at all]",
)
@click.option(
    "--namespace",
    default="",
    envvar="TRIMTAB_NAMESPACE",
    show_envvar=True,
    help="Where the Lease is that says which replica writes.  [default: that of this pod]",
)
@click.option(
    "--lease",
    default="trimtab",
    envvar="TRIMTAB_LEASE",
    show_default=True,
    show_envvar=True,
    help="Name of that Lease; replicas of one installation share it.",
)
@_log_level
def operator(*, log_level: str, **options: Any) -> None:
    """Balance the InferencePools of a cluster.

    The cluster is that of KUBECONFIG or ~/.kube/config, else the one in which this runs as a pod.
    """
    from trimtab import app, controller  # noqa: PLC0415  # help is quick

    app.run(controller.operator(controller.Operator(**options)), log_level=log_level)


@main.command()
@click.option(
    "--control",
    type=_Address(names_too=True),
    default="127.0.0.1:18000",
    show_default=True,
    help="Where Trimtab serves xDS: it says which pools there are.",
)
@click.option(
    "--listen",
    type=_Address(),
    default="127.0.0.1:9001",
    show_default=True,
    help="Where Envoy asks (ext_authz over HTTP/1.1).",
)
@click.option(
    "--telemetry",
    type=_Address(),
    default="127.0.0.1:8082",
    show_default=True,
    help="Where /metrics, /healthz, /readyz and /debug/decisions are.",
)
@_log_level
def picker(
    *,
    control: tuple[str, int],
    listen: tuple[str, int],
    telemetry: tuple[str, int],
    log_level: str,
) -> None:
    """Choose an endpoint for each request that Envoy asks about.

    Without it requests go by the weights.
    """
    from trimtab import picker as process  # noqa: PLC0415  # help is quick

    process.run(
        process.Options(control=control, listen=listen, telemetry=telemetry), log_level=log_level
    )


@main.command()
@_listen
@click.option(
    "--xds",
    type=_Address(names_too=True),
    default="127.0.0.1:18000",
    show_default=True,
    help="Where Trimtab serves xDS; a name will do.",
)
@click.option(
    "--picker",
    type=_Address(names_too=True),
    multiple=True,
    help="Where a picker listens: the active one, then those that stand by.  [default: none]",
)
@_admin_port
def envoy_bootstrap(
    *,
    listen: tuple[str, int],
    xds: tuple[str, int],
    picker: tuple[tuple[str, int], ...],
    envoy_admin_port: int,
) -> None:
    """Print what makes your Envoy the gateway.

    Write it to a file and start Envoy with it: envoy -c FILE.
    """
    from trimtab import app  # noqa: PLC0415  # help is quick

    bootstrap = app.gateway_bootstrap(
        listen=listen, xds=xds, admin_port=envoy_admin_port, pickers=picker
    )
    click.echo(app.as_yaml(bootstrap))


_passed_on = {"ignore_unknown_options": True}  # the command has its own options, loaded with it


@main.command(context_settings=_passed_on, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> None:
    """Compare Trimtab with Envoy's own balancing."""
    from trimtab.demo.command import demo_command  # noqa: PLC0415  # help is quick

    demo_command.main(arguments, prog_name="trimtab demo", standalone_mode=False)


@main.command(context_settings=_passed_on, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def simulate(arguments: tuple[str, ...]) -> None:
    """Compare balancing policies in simulated time, on your own trace."""
    from trimtab.simulate import simulate_command  # noqa: PLC0415  # help is quick

    simulate_command.main(arguments, prog_name="trimtab simulate", standalone_mode=False)


@main.command()
@click.argument("pool", required=False, default="", metavar="[[NAMESPACE/]POOL]")
@click.option(
    "--telemetry",
    type=_Address(names_too=True),
    default="127.0.0.1:8081",
    show_default=True,
    help="Where the operator or standalone has its /metrics.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on one line.")
def explain(*, pool: str, telemetry: tuple[str, int], as_json: bool) -> None:
    """Show why a pool is balanced as it is, with the numbers.

    In a cluster: kubectl exec deploy/trimtab-operator -- trimtab explain NAMESPACE/POOL
    """
    from trimtab import explain as command  # noqa: PLC0415  # help is quick

    command.run(pool, telemetry=telemetry, as_json=as_json)


@main.command()
def crd() -> None:
    """Print the CustomResourceDefinition of InferencePool.

    It is what the chart installs; without the chart: trimtab crd | kubectl apply -f -
    """
    from trimtab import crd  # noqa: PLC0415  # help is quick

    click.echo(crd.as_yaml(), nl=False)
