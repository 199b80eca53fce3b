"""`trimtab explain`: ask the running Trimtab for one pool's straight line, and print it.

The process that decides also explains (core/explaining.py), so what is printed is what the last
decision rested on, not a second opinion. Nothing but its telemetry port is needed: no rights in a
cluster, no file.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, TypeVar

import aiohttp
from pydantic import TypeAdapter, ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from trimtab.core.explaining import Explanation, duration
from trimtab.ports import ConfigurationError, TrimtabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.core.explaining import Row

_Form = TypeVar("_Form")

TIMEOUT_S = 10.0  # a process that answers no later is too busy to be explained
WIDE_COLUMNS = 200  # of a table, whatever the terminal: a line in pieces cannot be searched

_explanation = TypeAdapter(Explanation)
_names = TypeAdapter(list[str])


def run(pool: str, *, telemetry: tuple[str, int], as_json: bool) -> None:
    """Print one pool's explanation. `pool` may lack its namespace, or be empty if there is one.

    Raises:
        ConfigurationError: no such pool, or several.
        TrimtabError: nobody answers there, or not as Trimtab does.
    """
    page = asyncio.run(_ask(pool, telemetry))
    explanation = _read(_explanation, page, telemetry)
    if as_json:
        print(json.dumps(json.loads(page)))  # noqa: T201  # asked for
        return
    show(explanation, Console(width=WIDE_COLUMNS), columns=Console().width)


async def _ask(pool: str, telemetry: tuple[str, int]) -> bytes:
    host, port = telemetry
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(url, timeout=timeout, raise_for_status=True) as session:
            async with session.get("/debug/pools") as answer:
                names = _read(_names, await answer.read(), telemetry)
            async with session.get(f"/debug/pools/{choose(pool, names)}") as answer:
                return await answer.read()
    except aiohttp.ClientConnectorError as error:
        raise TrimtabError(
            f"nobody answers on {host}:{port}: is Trimtab running here? "
            "--telemetry HOST:PORT says where else"
        ) from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _foreign(telemetry, str(error) or f"no answer within {TIMEOUT_S:.0f} s") from error


def _read(form: TypeAdapter[_Form], page: bytes, telemetry: tuple[str, int]) -> _Form:
    try:
        return form.validate_json(page)
    except ValidationError as error:
        raise _foreign(telemetry, error.errors()[0]["msg"]) from error


def _foreign(telemetry: tuple[str, int], why: str) -> TrimtabError:
    host, port = telemetry
    return TrimtabError(
        f"what answers on {host}:{port} does not explain pools ({why}): --telemetry is to be that "
        "of this version's operator or standalone"
    )


def choose(pool: str, names: Sequence[str]) -> str:
    """Find the pool that is meant. Raises ConfigurationError."""
    if pool in names:
        return pool
    meant = [name for name in names if not pool or name.rpartition("/")[2] == pool]
    if len(meant) == 1:
        return meant[0]
    if not names:
        raise ConfigurationError("no pool is served yet")
    known = ", ".join(meant or names)
    if meant:
        raise ConfigurationError(f"which pool? One of: {known}")
    raise ConfigurationError(f"no pool {pool!r} is served; there are: {known}")


def show(explanation: Explanation, console: Console, *, columns: int) -> None:
    """Print it for people: sentences fold at `columns` in a terminal, and nowhere else."""

    def say(text: str, style: str = "") -> None:
        folds = console.is_terminal
        console.print(
            text,
            style=style,
            markup=False,
            highlight=False,
            soft_wrap=not folds,
            width=columns if folds else None,
        )

    lasts = explanation.verdict_for_s
    since = "" if lasts is None else f" for {duration(lasts)}"
    say(f"{explanation.pool}: {explanation.verdict}{since}: {explanation.sentence}", "bold")
    if explanation.answer:
        say(explanation.answer, "bold yellow")
    say(f"Evidence: {explanation.evidence}.")
    if explanation.rows:
        console.print(_table(explanation.rows))
    for row in explanation.rows:
        if row.reason:
            where = row.name if row.name == row.address else f"{row.name} ({row.address})"
            say(f"{where} is {row.state}: {row.reason}.")
    for deed in explanation.deeds:
        say(deed)


def _table(rows: Sequence[Row]) -> Table:
    """Left to right as the data flows: what was read, what follows, what is done."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 0))
    table.add_column("endpoint", no_wrap=True)
    for name in ("run", "wait", "KV", "speed", "age", "→ backlog", "of all", "drain", "→ share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.running:.0f}",
            f"{row.waiting:.0f}",
            "" if row.kv_percent is None else f"{row.kv_percent:.0f} %",
            f"{row.speed_percent:.0f} %",
            "never" if row.age_s is None else duration(row.age_s),
            f"{row.backlog_tokens:,.0f}",
            f"{row.backlog_percent:.0f} %",
            f"{row.drain_s:.2f} s",
            f"{row.weight_percent:.1f} %",
            row.state,
        )
    return table
