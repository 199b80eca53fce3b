"""A fleet from a YAML file: pools as in the custom resource, with their endpoints written down.

A file that cannot be carried out says where and why in one line: file, line, field, rule. While
Trimtab runs the file is looked at twice a second by content, which sees edits, atomic replacement
and swapped symlinks alike; it counts when two looks agree, so that a file half written does not.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Self

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    IPvAnyAddress,
    StringConstraints,
    ValidationError,
    model_validator,
)

from trimtab.api import PoolSpec
from trimtab.core.model import Endpoint
from trimtab.ports import ConfigurationError
from trimtab.schema import Schema, Whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Hashable
    from pathlib import Path

    from pydantic_core import ErrorDetails

    from trimtab.ports import Clock

LOOK_EVERY_S = 0.5
MAX_FILE_BYTES = 1 << 20  # 10,000 endpoints; read twice a second

_ADDRESS = re.compile(r"(?:\[(?P<bracketed>[^][]+)\]|(?P<plain>[^][:]+)):(?P<port>[0-9]+)")


def _not_the_api(name: str) -> str:
    # Envoy leads /NAME/... to the pool NAME, and /v1/... is the API of all pools.
    if re.fullmatch(r"v[0-9]+", name):
        raise ValueError("a pool may not be called like a version of the API (v1, v2, ...)")
    return name


PoolName = Annotated[
    str,
    StringConstraints(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"),
    AfterValidator(_not_the_api),
]
Address = Annotated[IPvAnyAddress, AfterValidator(str)]


class Entry(Schema):
    """One endpoint: `address:port`, or its parts with the name of its pod."""

    # Envoy resolves no names in the tables it is sent, so there are none here.
    address: Address = Field(description="IPv4 or IPv6 address.")
    port: Whole = Field(ge=1, le=65_535, description="Port of the OpenAI API and the metrics page.")
    pod: str = Field(
        default="", max_length=253, description="Name in reports; empty: address:port."
    )

    def endpoint(self) -> Endpoint:
        host = f"[{self.address}]" if ":" in str(self.address) else str(self.address)
        return Endpoint(self.pod or f"{host}:{self.port}", str(self.address), self.port)


def _taken_apart(entry: object) -> object:
    if not isinstance(entry, str):
        return entry
    if (match := _ADDRESS.fullmatch(entry)) is None:
        raise ValueError('an endpoint is written "10.0.0.1:8000" or "[::1]:8000"')
    return {"address": match["bracketed"] or match["plain"], "port": int(match["port"])}


class FleetPool(PoolSpec):
    """A pool's spec, its name and its endpoints."""

    name: PoolName = Field(description="Unique; also the model it serves, unless routing says.")
    entries: tuple[Annotated[Entry, BeforeValidator(_taken_apart)], ...] = Field(
        alias="endpoints",
        min_length=1,
        max_length=1000,
        description='Who serves: "address:port", or {address, port, pod}.',
    )

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return tuple(entry.endpoint() for entry in self.entries)

    @model_validator(mode="after")
    def _endpoints_differ(self) -> Self:
        seen: set[tuple[str, int]] = set()
        for pod, address, port in self.endpoints:
            if (address, port) in seen:
                raise ValueError(f"endpoint {pod} is listed twice")
            seen.add((address, port))
        return self


class Fleet(Schema):
    """All that one Trimtab balances."""

    pools: tuple[FleetPool, ...] = Field(min_length=1, max_length=200)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        seen: set[str] = set()
        for pool in self.pools:
            if pool.name in seen:
                raise ValueError(f"two pools are called {pool.name}")
            seen.add(pool.name)
        return self


class FleetFile:
    """One fleet file that may change while it is used."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._followed: bytes | str = ""
        """The content last told of, or what was wrong with it."""

    def load(self) -> Fleet:
        """Read the fleet. Raises ConfigurationError: one line that names line, field and rule."""
        self._followed = content = _read(self._path)
        return _parse(self._path, content)

    async def changes(self) -> AsyncIterator[Fleet | ConfigurationError]:
        """Yield what the file says, or what is wrong with it, once for each change since `load`."""
        seen = self._followed
        while True:
            await self._clock.sleep_until_s(self._clock.now_s() + LOOK_EVERY_S)
            before, seen = seen, self._look()
            if seen == before and seen != self._followed:
                self._followed = seen
                yield self._said(seen)

    def _said(self, content: bytes | str) -> Fleet | ConfigurationError:
        if isinstance(content, str):
            return ConfigurationError(content)
        try:
            return _parse(self._path, content)
        except ConfigurationError as error:
            return error

    def _look(self) -> bytes | str:
        try:
            return _read(self._path)
        except ConfigurationError as error:
            return str(error)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigurationError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    return content


class _Loader(yaml.SafeLoader):
    """YAML allows one key twice and keeps the last; that is never what somebody meant."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    rule = f"{key.value} is set twice"
                    raise yaml.constructor.ConstructorError(None, None, rule, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(path: Path, content: bytes) -> Fleet:
    try:
        loader = _Loader(content)
        root = loader.get_single_node()
        fields = loader.construct_document(root) if root else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        rule = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigurationError(f"{path}:{line}: not valid YAML: {rule}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        rule = " ".join(str(error).split())
        raise ConfigurationError(f"{path}: not valid YAML: {rule}") from error
    try:
        return Fleet.model_validate(fields)
    except ValidationError as error:
        first, *others = filter(_is_a_cause, error.errors(include_url=False))
        line = _line(root, first["loc"])
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigurationError(
            f"{path}:{line}: {_field(first['loc'])} {_rule(first)}{more}"
        ) from error


def _is_a_cause(error: ErrorDetails) -> bool:
    """Whether this is more than the echo of another: refused items are also missed as items."""
    return error["type"] != "too_short" or len(error["input"]) < error["ctx"]["min_length"]


def _line(node: yaml.Node | None, location: tuple[int | str, ...]) -> int:
    """Where a field stands, or the innermost thing around it that is written down."""
    line = node.start_mark.line if node else 0
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1


def _field(location: tuple[int | str, ...]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".") or "the file"


_RULES = {
    "extra_forbidden": "is no field that is known here",
    "missing": "is required",
    "model_type": "must be a mapping of fields to values",
    "tuple_type": "must be a list",
    "ip_any_address": "must be an IPv4 or IPv6 address",
    "too_short": "must have at least {min_length} item",
    "too_long": "must have at most {max_length} items",
    "string_pattern_mismatch": "must match {pattern}",
}


def _rule(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if "error" in context:  # raised by a validator of ours, which says it all
        return f"is refused: {context['error']}"
    rule = _RULES.get(error["type"], "").format(**context)
    rule = rule or error["msg"].replace("Input should", "must").replace("String should", "must")
    got = error["input"]
    says_it = error["type"] == "extra_forbidden" or not isinstance(got, str | int | float)
    return rule if says_it else f"{rule}, not {got!r}"
