"""Kopf as the watcher: it tells what the API server says, and writes nothing there.

Kopf runs in a thread and a loop of its own, because it cancels every task of its loop that is not
its own, and is made anew whenever it ends, stands still or hangs in its own exit. Two of its gaps are closed here, in the
HTTP session that it is given: it tells no handler what a list did not name, so the lists are read
off the wire; and it hides bookmarks, so that streams are kept short enough for their renewal to
prove that somebody is still watching.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
import kopf
import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

GROUP, VERSION = "trimtab.dev", "v1alpha1"
KINDS = {"inferencepools": (GROUP, VERSION), "pods": ("", "v1")}
"""What is watched: plural, group and version."""

STREAM_S = 15  # the server ends a stream after that, and it is renewed where it ended
SILENT_S = 20.0  # a stream that says nothing for longer than it lives is dead
STALE_S = 45.0  # nobody asked, though a stream lives for 15 s, or silent for 20: made anew
DEAD_S = 120.0  # not even that has helped
START_S = 30.0  # no list so long after the start: the resource definition may have come since
ANSWER_S = 30.0  # a list of 10,000 pods from a busy server
CONNECT_S = 5.0
RETRY_S = 1.0
LOOK_EVERY_S = 0.1
LEAVE_S = 5.0
_BACKOFFS_S = (0.5, 1.0, 2.0)  # and the last for ever: the API server may be away for hours

log = structlog.get_logger(__name__)


class Listener(Protocol):
    """Who is told, in Kopf's thread. Words of one object come in their order."""

    def told(self, kind: str, item: Mapping[str, Any], *, gone: bool) -> None: ...

    def listed(self, kind: str, items: Iterable[Mapping[str, Any]], *, version: str) -> None: ...


class _Backoffs:
    """Kopf asks for a fresh series for each request."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain(_BACKOFFS_S, itertools.repeat(_BACKOFFS_S[-1]))


class _Obituaries(logging.Handler):
    """Only its log says that a task of Kopf's has died, and Kopf may hang from then on."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.death = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.death = self.death or repr(record.exc_info[1])


class Watch:
    """Watches pools and pods from `start` to `stop`."""

    def __init__(
        self,
        listener: Listener,
        *,
        namespace: str = "",
        pod_selector: str = "",
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Say whom to tell.

        Args:
            listener: Told in Kopf's thread.
            namespace: The only one to watch; empty: all.
            pod_selector: Labels without which pods are not even sent, as `kubectl -l` has them.
            now_s: Monotonic seconds.
        """
        self._listener = listener
        self._namespace = namespace
        self._pod_selector = pod_selector
        self._now_s = now_s
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._main, name="kopf", daemon=True)
        self._asked_s: dict[str, float] = {}
        self._sessions: list[aiohttp.ClientSession] = []
        self._complaints: dict[str, str] = {}
        """What the log already says is wrong, by kind."""
        self.failures_total = 0
        """Words that could not be passed on, and ends that nobody asked for."""

    def start(self) -> None:
        self._began_s = self._now_s()
        self._thread.start()

    async def stop(self) -> None:
        """Return when nothing is told any more, or at least nobody waits for it any longer."""
        self._leaving.set()
        await asyncio.to_thread(self._thread.join, 2 * LEAVE_S)

    @property
    def stale(self) -> list[str]:
        """Kinds about which nobody asks and will ask any more: only a new process can help.

        An API server that is away makes nothing stale: it is asked again and again.
        """
        now_s = self._now_s()
        last_s = {k: max(self._began_s, self._asked_s.get(k, -math.inf)) for k in KINDS}
        return [kind for kind, asked_s in last_s.items() if now_s - asked_s > DEAD_S]

    # In Kopf's thread

    def _main(self) -> None:
        # It logs each event, and each attempt of an outage; we log changes.
        kopfs = logging.getLogger("kopf")
        kopfs.setLevel(logging.ERROR)
        kopfs.propagate = False
        kopfs.addHandler(logging.NullHandler())
        while not self._leaving.is_set():
            try:
                asyncio.run(self._watch())
            except Exception as error:  # noqa: BLE001  # a thread's top: told, and made anew
                self._complain("watch", repr(error))
            self._leaving.wait(RETRY_S)

    def _complain(self, what: str, reason: str) -> None:
        if self._leaving.is_set():
            return
        self.failures_total += 1
        if self._complaints.get(what) != reason:
            self._complaints[what] = reason
            log.warning("the API server tells nothing, it is asked again", of=what, reason=reason)

    async def _watch(self) -> None:
        """Run one Kopf until it is to end, dies or stands still."""
        self._began_s, self._asked_s = self._now_s(), {}
        stop, obituaries = asyncio.Event(), _Obituaries()
        kopfs = asyncio.create_task(
            kopf.operator(
                registry=self._handlers(),
                settings=self._settings(),
                standalone=True,
                clusterwide=not self._namespace,
                namespaces=[self._namespace] if self._namespace else [],
                stop_flag=stop,
            )
        )
        logging.getLogger("kopf").addHandler(obituaries)
        try:
            while not (kopfs.done() or obituaries.death or self._stands_still()):
                await asyncio.wait([kopfs], timeout=LOOK_EVERY_S)
                if self._leaving.is_set():
                    stop.set()
                    await asyncio.wait([kopfs], timeout=LEAVE_S)
                    return
            if obituaries.death or kopfs.done():
                self._complain("watch", obituaries.death or "Kopf has ended")
        finally:
            logging.getLogger("kopf").removeHandler(obituaries)
            await self._end_all()

    async def _end_all(self) -> None:
        """End what Kopf has left in our loop; it hangs at times, and swallows a cancellation."""
        give_up_s = time.monotonic() + LEAVE_S
        while (left := asyncio.all_tasks() - {asyncio.current_task()}) and (
            time.monotonic() < give_up_s
        ):
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=LOOK_EVERY_S)
        while self._sessions:
            await self._sessions.pop().close()

    def _stands_still(self) -> bool:
        now_s = self._now_s()
        missing = [k for k in KINDS if k not in self._asked_s and now_s - self._began_s > START_S]
        still = [k for k, asked_s in self._asked_s.items() if now_s - asked_s > STALE_S]
        if still:
            self._complain("watch", f"nobody asks for {', '.join(still)}")
        elif missing and "watch" not in self._complaints:
            self._complain("watch", f"there are no {', '.join(missing)}: is the CRD installed?")
        elif len(self._asked_s) == len(KINDS):
            self._complaints.pop("watch", None)
        return bool(missing or still)

    def _handlers(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(id="login", registry=registry)(self._login)
        for kind, (group, version) in KINDS.items():
            kopf.on.event(group, version, kind, id=kind, registry=registry)(self._teller(kind))
        return registry

    def _teller(self, kind: str) -> Any:
        async def tell(event: Any, **_: object) -> None:
            """Pass on a word. Kopf never asks again, so this does not fail."""
            gone = event["type"] == "DELETED"
            self._pass_on(self._listener.told, kind, event["object"], gone=gone)

        return tell

    def _pass_on(self, tell: Callable[..., None], *words: object, **more: object) -> None:
        try:
            tell(*words, **more)
        except Exception:
            if not self._leaving.is_set():
                self.failures_total += 1
                log.exception("a word of the API server was lost")

    def _settings(self) -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False
        settings.scanning.disabled = True  # what is watched is known; no rights to see definitions
        settings.process.ultimate_exiting_timeout = None  # it would kill us all
        settings.watching.server_timeout = STREAM_S
        settings.watching.inactivity_timeout = SILENT_S
        settings.watching.connect_timeout = CONNECT_S
        settings.networking.connect_timeout = CONNECT_S
        settings.networking.request_timeout = ANSWER_S
        settings.networking.error_backoffs = _Backoffs()
        # Never written, as no handler of ours asks for it; if ever, then under our own name.
        settings.persistence.finalizer = f"{GROUP}/finalizer"
        settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
        settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
        if self._pod_selector:
            settings.watching.label_selectors["v1", "pods"] = self._pod_selector
        return settings

    async def _login(self, **known: Any) -> kopf.AiohttpSession:
        """Log in as kubectl does, else as the pod's ServiceAccount; asked again after each 401."""
        found = kopf.login_with_kubeconfig(**known) or kopf.login_with_service_account(**known)
        if found is None:
            raise kopf.PermanentError("neither a kubeconfig nor a ServiceAccount is there")
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=found.as_ssl_context()),
            headers=found.as_http_headers(),
            proxy=found.proxy_url,
            trust_env=found.trust_env,
            trace_configs=[self._traces()],
        )
        self._sessions.append(session)
        return kopf.AiohttpSession(
            server=found.server,
            default_namespace=found.default_namespace,
            aiohttp_session=session,
        )

    def _traces(self) -> aiohttp.TraceConfig:
        traces = aiohttp.TraceConfig()
        traces.on_request_start.append(self._asked)
        traces.on_request_end.append(self._heard)
        traces.on_request_exception.append(self._failed)
        traces.on_response_chunk_received.append(self._answered)
        return traces

    async def _asked(self, _: object, __: object, request: aiohttp.TraceRequestStartParams) -> None:
        if (kind := request.url.name) in KINDS:
            self._asked_s[kind] = self._now_s()

    async def _heard(self, _: object, __: object, end: aiohttp.TraceRequestEndParams) -> None:
        if (kind := end.url.name) not in KINDS:
            return
        if not end.response.ok:
            self._complain(kind, f"{end.response.status} {end.response.reason}")
        elif self._complaints.pop(kind, ""):
            log.info("the API server tells again", of=kind)

    async def _failed(
        self, _: object, __: object, end: aiohttp.TraceRequestExceptionParams
    ) -> None:
        if isinstance(end.exception, Exception):
            kind = end.url.name if end.url.name in KINDS else "watch"
            self._complain(kind, type(end.exception).__name__)

    async def _answered(
        self, _: object, __: object, answer: aiohttp.TraceResponseChunkReceivedParams
    ) -> None:
        """See a whole answer; streams are not shown here."""
        if (kind := answer.url.name) not in KINDS or "watch" in answer.url.query:
            return
        body = json.loads(answer.chunk)
        if "items" in body:  # else it is an error, which Kopf deals with
            version = body["metadata"]["resourceVersion"]
            self._pass_on(self._listener.listed, kind, body["items"], version=version)
