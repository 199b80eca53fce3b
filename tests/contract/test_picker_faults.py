"""The picker may die, hang, return, lose its control plane: no request fails of it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from rig_envoy import MODEL, until
from rig_picker import PICKED, run_picked
from trimtab.adapters.xds import XdsServer
from trimtab.core.model import Snapshot

if TYPE_CHECKING:
    from rig_picker import PickedRig, Picker


async def test_a_killed_picker_costs_no_request_and_its_successor_is_asked() -> None:
    async with run_picked() as here, here.rig.load() as load:
        [picker] = here.pickers
        await until(lambda: _picks(picker, 100))
        await picker.end()
        await load.passes(200)
        await picker.start(here.rig.xds.port)
        await here.healthy(1)
        before = await picker.picks()
        await until(lambda: _picks(picker, before + 100))
    assert load.failed == []


async def test_a_hung_picker_costs_no_request_and_is_asked_again_when_it_goes_on() -> None:
    async with run_picked() as here, here.rig.load() as load:
        [picker] = here.pickers
        await load.passes(50)
        picker.send(signal.SIGSTOP)
        await load.passes(50)
        await here.healthy(0)
        await load.passes(200)
        picker.send(signal.SIGCONT)
        await here.healthy(1)
        before = await picker.picks()
        await until(lambda: _picks(picker, before + 100))
    assert load.failed == []


async def test_the_standby_takes_over_from_a_killed_picker_and_gives_back() -> None:
    async with run_picked(pickers=2) as here, here.rig.load() as load:
        active, standby = here.pickers
        await until(lambda: _picks(active, 100))
        await active.end()
        before = await standby.picks()
        await until(lambda: _picks(standby, before + 100))
        await active.start(here.rig.xds.port)
        await until(lambda: _picks(active, 100))
    assert load.failed == []


async def _picks(picker: Picker, count: float) -> bool:
    return await picker.picks() >= count


async def test_without_a_control_plane_the_picker_goes_on_and_follows_its_successor() -> None:
    async with run_picked() as here:
        [picker] = here.pickers
        endpoints = here.rig.endpoints
        async with here.rig.load() as load:
            await load.passes(50)
            await here.rig.xds.stop()
            await until(lambda: _hears(picker, 0))
            before = await picker.picks()
            await until(lambda: _picks(picker, before + 100))

            successor = XdsServer(port=here.rig.xds.port)
            successor.set_pools({"gateway": [PICKED]})
            one = Snapshot({endpoints[0]: 1}, draining=frozenset(endpoints[1:]))
            await successor.publish(PICKED.name, one)
            await successor.start()
            try:
                await until(lambda: _excludes(picker, {endpoint.pod for endpoint in endpoints[1:]}))
                await load.passes(50)
                latest = (await picker.decisions())[-1]
                assert [c["pod"] for c in latest["candidates"]] == [endpoints[0].pod]
            finally:
                await successor.stop()
        assert load.failed == []


async def _hears(picker: Picker, connected: int) -> bool:
    return await picker.values("control_connected") == {"": connected}


async def _excludes(picker: Picker, pods: set[str]) -> bool:
    values = await picker.values("endpoint_excluded")
    return {pod for pod, value in values.items() if value} == pods


async def test_a_dead_endpoint_is_found_by_its_page_and_taken_back() -> None:
    async with run_picked() as here, here.rig.load() as load:
        [picker] = here.pickers
        await load.passes(50)
        engine = here.rig.fleet.engines[0]
        await engine.switch(crashed=True)
        begun = load.started
        await until(lambda: _excludes(picker, {"pod-0"}))
        await load.passes(50)
        await engine.switch(crashed=False)
        await until(lambda: _excludes(picker, set()))
        await load.passes(50)
        assert [failure for failure in load.failed if failure[0] > begun] == []


async def test_the_books_agree_with_the_engines_whoever_sent_the_requests() -> None:
    """Requests that came past Envoy, and those whose clients left, are in the gauges."""
    async with run_picked([MODEL] * 2, speed=1.0) as here:
        [picker] = here.pickers
        streams = [here.rig.gateway.open_stream(tokens=2000) for _ in range(6)]
        answers = [await stream.__aenter__() for stream in streams]
        body = {"model": MODEL, "prompt": "tell", "max_tokens": 2000, "ignore_eos": True}
        url = f"http://127.0.0.1:{here.rig.endpoints[0].port}/v1/completions"
        answers += [
            await here.rig.gateway.session.post(url, json=body | {"stream": True}) for _ in range(4)
        ]
        await until(lambda: _in_flight(here, 10))
        for answer in answers[:3]:
            answer.close()
        await until(lambda: _in_flight(here, 7))
        await picker.end()
        await picker.start(here.rig.xds.port)
        await until(lambda: _in_flight(here, 7))
        for answer in answers[3:]:
            answer.close()


async def _in_flight(here: PickedRig, count: int) -> bool:
    requests = await here.pickers[0].values("endpoint_requests")
    engines = [fleet.engine for fleet in here.rig.fleet.engines]
    return sum(requests.values()) == count == sum(e.running + len(e.waiting) for e in engines)
