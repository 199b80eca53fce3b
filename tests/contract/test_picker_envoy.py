"""What a picker says, Envoy does; what it fails to say, or says wrongly, harms no request."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from rig_envoy import MODEL, free_ports, run_rig, until
from trimtab.adapters.authz import AuthzServer
from trimtab.core.model import Snapshot
from trimtab.envoy_config import PoolRoute

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from rig_envoy import Gateway, Rig
    from trimtab.core.model import Endpoint

PICKED = PoolRoute("llama", picked=True)
NAMES = ("first", "second", "third")
JSON = {"content-type": "application/json"}


@dataclass
class Script:
    """A chooser that says what it is told to say."""

    answer: Sequence[Endpoint] = ()
    ready: bool = True
    asked: list[tuple[str, int | None]] = field(default_factory=list)

    def choose(self, pool: str, body_bytes: int | None) -> Sequence[Endpoint]:
        self.asked.append((pool, body_bytes))
        return self.answer


@dataclass
class Picked:
    """A gateway that asks a scripted picker."""

    rig: Rig
    script: Script

    async def served_by(self, requests: int, **options: Any) -> Counter[str]:
        """Ask for a model that only one engine has, in turn; who answered, by name."""
        served: Counter[str] = Counter()
        for number in range(requests):
            body = ask(NAMES[number % len(NAMES)])
            status, answer = await self.rig.gateway.post(body, **options)
            name = answer["model"] if status == 200 else _refused_by(answer)
            served[name] += 1
        return served


def ask(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": "hello", "max_tokens": 1}


def _refused_by(answer: dict[str, Any]) -> str:
    assert answer["error"]["code"] == 404, answer
    return "another"


@asynccontextmanager
async def picked(
    pools: Mapping[PoolRoute, Sequence[int]] | None = None, names: Sequence[str] = NAMES
) -> AsyncIterator[Picked]:
    script = Script()
    async with AuthzServer(script).serve("127.0.0.1", 0) as port:
        members = pools or {PICKED: range(len(names))}
        async with run_rig(names, pools=members, pickers=[port]) as rig:
            await until(lambda: _is_healthy(rig.gateway))
            yield Picked(rig, script)


async def _is_healthy(gateway: Gateway) -> bool:
    return await gateway.stat("cluster.trimtab_picker.membership_healthy") > 0


async def test_every_request_goes_where_the_picker_says() -> None:
    async with picked() as here:
        for endpoint, name in zip(here.rig.endpoints, NAMES, strict=True):
            here.script.answer = [endpoint]
            assert await here.served_by(9) == {name: 3, "another": 6}


async def test_weights_stay_below_the_picker() -> None:
    async with picked() as here:
        light, *heavy = here.rig.endpoints
        await here.rig.publish(Snapshot({light: 1, **dict.fromkeys(heavy, 1000)}))
        here.script.answer = [light]
        assert await here.served_by(9) == {NAMES[0]: 3, "another": 6}


async def test_the_picker_hears_the_pool_and_the_size_of_any_body() -> None:
    pools = {replace(PICKED, name="one"): [0], replace(PICKED, name="two", models=("b",)): [1]}
    async with picked(pools, names=["one", "b"]) as here:
        gateway, asked = here.rig.gateway, here.script.asked
        body = json.dumps(ask("b") | {"prompt": "x" * 200_000}).encode()

        async def in_pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 10_000):
                yield body[start : start + 10_000]

        assert (await gateway.post(body, headers=JSON))[0] == 200
        assert (await gateway.post(in_pieces(), headers=JSON))[0] == 200
        assert (await gateway.post(body, path="/two/v1/completions", headers=JSON))[0] == 200
        assert asked == [("two", len(body))] * 3
        spoofed = JSON | {"x-trimtab-pool": "one", "x-trimtab-length": "7", "x-trimtab-bytes": "7"}
        assert (await gateway.post(body, headers=spoofed))[0] == 200
        assert (await gateway.post(in_pieces(), headers=spoofed))[0] == 200
        assert asked[3:] == [("two", len(body))] * 2


async def test_nobody_is_asked_about_a_request_that_brings_no_work() -> None:
    async with picked({PICKED: [0], PoolRoute("second"): [1]}, names=["llama", "second"]) as here:
        gateway = here.rig.gateway
        assert (await gateway.get("/v1/models"))[0] == 200
        assert (await gateway.get("/llama/v1/models"))[0] == 200
        assert (await gateway.post(ask("nobody's")))[0] == 404
        assert (await gateway.post(ask("second")))[0] == 200
        assert here.script.asked == []
        assert (await gateway.post(ask("llama")))[0] == 200
        assert len(here.script.asked) == 1


@pytest.mark.parametrize("header", ["x-trimtab-endpoint", "x-gateway-destination-endpoint"])
async def test_a_client_that_names_its_endpoint_is_not_obeyed(header: str) -> None:
    async with picked() as here:
        wanted, chosen, _ = here.rig.endpoints
        headers = {header: f"{wanted.address}:{wanted.port}"}
        here.script.answer = [chosen]
        assert await here.served_by(9, headers=headers) == {NAMES[1]: 3, "another": 6}
    # And without a picker: of 30 requests over three endpoints, one is not served 30 times.
    async with run_rig(NAMES, pools={PICKED: range(3)}, pickers=free_ports(1)) as rig:
        here = Picked(rig, Script())
        headers = {header: f"{rig.endpoints[0].address}:{rig.endpoints[0].port}"}
        answers = [await rig.gateway.post(ask(NAMES[0]), headers=headers) for _ in range(30)]
        assert {status for status, _ in answers} == {200, 404}


async def test_when_the_first_choice_is_dead_the_second_is_next() -> None:
    async with picked() as here:
        dead, second, _ = here.rig.endpoints
        await here.rig.fleet.engines[0].switch(crashed=True)
        here.script.answer = [dead, second]
        assert await here.served_by(9) == {NAMES[1]: 3, "another": 6}


async def test_an_endpoint_that_envoy_does_not_know_is_not_gone_to() -> None:
    async with picked() as here:
        here.script.answer = [here.rig.endpoints[0]._replace(port=9)]
        served = await here.served_by(30)
        assert sum(served.values()) == 30


Raw = bytes | None
"""What a picker of no use answers; None for nothing at all."""


@pytest.mark.parametrize(
    "raw",
    [
        None,
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx-trimtab-endpoint: \xff\xfe,,:::0\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx-trimtab-endpoint: nowhere:99999\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000,
    ],
    ids=["nothing", "end", "garbage", "binary", "nowhere", "cut", "error", "endless"],
)
async def test_whatever_a_picker_answers_requests_go_on(raw: Raw) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /readyz "):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            elif raw is None:
                await reader.read()
            else:
                writer.write(raw)
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        members = {PICKED: range(2)}
        async with run_rig([MODEL] * 2, pools=members, pickers=[port]) as rig:
            await until(lambda: _is_healthy(rig.gateway))
            async with rig.load() as load:
                await load.passes(50)
            assert load.failed == []


async def test_only_the_first_picker_that_is_ready_is_asked() -> None:
    active, standby = Script(), Script()
    async with (
        AuthzServer(active).serve("127.0.0.1", 0) as first,
        AuthzServer(standby).serve("127.0.0.1", 0) as second,
        run_rig([MODEL] * 2, pools={PICKED: range(2)}, pickers=[first, second]) as rig,
    ):

        async def both_are_known() -> bool:
            return await rig.gateway.stat("cluster.trimtab_picker.membership_healthy") == 2

        async def one_is_known() -> bool:
            return await rig.gateway.stat("cluster.trimtab_picker.membership_healthy") == 1

        await until(both_are_known)
        async with rig.load() as load:
            await load.passes(50)
            assert (bool(active.asked), standby.asked) == (True, [])
            active.ready = False
            await until(one_is_known)
            seen = len(active.asked)
            await load.passes(50)
            assert standby.asked
            assert len(active.asked) <= seen + 4  # what was under way
        assert load.failed == []
