"""What a schema is made of here: models that refuse what they do not know, rules, keyed lists.

A rule is said twice, in CEL for the API server and in Python for fleet files, with one message;
tests hold both against the same resources.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, core_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pydantic.json_schema import JsonSchemaValue

VALIDATIONS = "x-kubernetes-validations"
LIST_TYPE = "x-kubernetes-list-type"
LIST_KEYS = "x-kubernetes-list-map-keys"


@dataclass(frozen=True, slots=True)
class Rule:
    """What must hold, in both languages, and what people are told when it does not."""

    cel: str
    holds: Callable[[Any], bool]
    message: str
    field: str = ""
    """The field to name, seen from the value that has the rule; empty: the value itself."""

    def check(self, value: Any) -> Any:
        if not self.holds(value):
            raise ValueError(f"{self.field} {self.message}".lstrip())
        return value

    def validation(self) -> dict[str, str]:
        """Say it to the API server, which puts the field in front of the message itself."""
        told = {"rule": self.cel, "message": self.message}
        return told | ({"fieldPath": f".{self.field}"} if self.field else {})

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        shown = handler(schema)
        return shown | {VALIDATIONS: [*shown.get(VALIDATIONS, ()), self.validation()]}


def form(pattern: str, message: str) -> Rule:
    """Say the form of a string in words: a pattern alone tells nobody what to write."""
    has = re.compile(pattern).fullmatch
    return Rule(f"self.matches(r'^{pattern}$')", lambda text: bool(has(text)), message)


@dataclass(frozen=True, slots=True)
class Keyed:
    """A list whose items differ: in the fields named, or as a whole where none is."""

    keys: tuple[str, ...] = ()

    def check(self, items: Sequence[Any]) -> Sequence[Any]:
        seen = set()
        for item in items:
            identity = tuple(getattr(item, key) for key in self.keys) or item
            if identity in seen:
                told = identity if not self.keys else ", ".join(map(str, identity))
                raise ValueError(f"{told} is listed twice")
            seen.add(identity)
        return items

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        kind = {LIST_TYPE: "map", LIST_KEYS: list(self.keys)} if self.keys else {LIST_TYPE: "set"}
        return handler(schema) | kind


class Schema(BaseModel):
    """A typing error must not pass for a setting, so unknown fields are refused."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)

    RULES: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        for rule in self.RULES:
            rule.check(self)
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        shown = handler(schema)
        if cls.RULES:
            handler.resolve_ref_schema(shown)[VALIDATIONS] = [r.validation() for r in cls.RULES]
        return shown


# Strict, or "100" and `true` would pass for numbers here and be refused by the API server.
Whole = Annotated[int, Field(strict=True)]
