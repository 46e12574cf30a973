"""Objects that list their properties have no others, unless the schema says otherwise.

Owns the choice of the objects that can be closed. JSON Schema leaves them open, but who writes a list of
properties rarely wants more of them, and small models fill pages with keys of their own. A closed object is
still valid by the schema as it came. Where others have a say in the same object (`allOf`, siblings of a
reference, alternatives beside properties), closing could leave nothing at all, so one stays open unless it
knows every name that any of them mentions. Branches of `oneOf` stay open where they exclude each other only
once they are closed: the output would fit two of the branches as they came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from graphllm.structured.schema_branches import intersects, target_of
from graphllm.structured.work_budget import WALKED_SCHEMAS, WorkBudget

# With any of these an object has said what it thinks of other names.
_OPENERS = ("additionalProperties", "patternProperties", "unevaluatedProperties")
_ALTERNATIVES = ("anyOf", "oneOf")
_IN_PLACE = ("allOf", *_ALTERNATIVES)
_SINGLE = ("items", "additionalProperties", "additionalItems")
_LISTS = ("prefixItems", "items")
# A schema without any of these neither has properties nor leads to others.
_LEADING_ON = frozenset({"$ref", "$id", "properties", "patternProperties", *_IN_PLACE, *_SINGLE, *_LISTS})
_TYPES = frozenset({"null", "boolean", "number", "string", "array", "object"})

Schema = dict[str, Any]


def close_objects(root: Schema, budget: WorkBudget) -> None:
    """Set `additionalProperties` to false wherever that is safe, in place.

    Leaves all objects open where a reference points at something that is not found. Spends what the walk
    costs. Raises InvalidRequestError.
    """
    walk = _Walk(root, budget)
    walk.run()
    if walk.is_lost:
        return
    for schema in walk.objects():
        schema["additionalProperties"] = False


class _Walk:
    """Finds the schemas that apply to something, and those among them that have to stay open."""

    def __init__(self, root: Schema, budget: WorkBudget) -> None:
        self._root = root
        self._budget = budget
        self._reached: dict[int, Schema] = {}
        # Schemas that are not closed, and those below which nothing is.
        self._open: set[int] = set()
        self._all_open: set[int] = set()
        self.is_lost = False

    def run(self) -> None:
        pending: list[tuple[Schema, bool]] = [(self._root, False)]
        while pending and not self.is_lost:
            schema, stays_open = pending.pop()
            # What is reached as a part of a larger family is judged there, and not more leniently.
            if id(schema) in (self._all_open if stays_open else self._reached):
                continue
            family = self._family(schema)
            self._budget.spend(len(family) // WALKED_SCHEMAS)
            new = [member for member in family if id(member) not in self._reached]
            self._reached.update((id(member), member) for member in new)
            if stays_open:
                self._all_open.update(map(id, family))
            else:
                self._keep_open_what_must_be(family)
            pending += self._below(family, stays_open=stays_open)
            # The outermost last, to be looked at first: it settles what lies below it too.
            pending += [
                (branch, True) for member in reversed(new) for branch in self._inexclusive_branches(member)
            ]

    def objects(self) -> list[Schema]:
        """The schemas to close."""
        return [
            schema
            for key, schema in self._reached.items()
            if key not in self._open and key not in self._all_open and _lists_properties(schema)
        ]

    def _family(self, schema: Schema) -> list[Schema]:
        """All schemas that may have a say in the same value: itself, branches, what they refer to."""
        found: dict[int, Schema] = {}
        pending: list[Any] = [schema]
        while pending:
            member = pending.pop()
            if not isinstance(member, dict) or id(member) in found:
                continue
            found[id(member)] = member
            if "$ref" in member:
                target = target_of(self._root, member["$ref"])
                self.is_lost |= target is None
                pending.append(target)
            # Below another base, references mean something else.
            self.is_lost |= "$id" in member and member is not self._root
            for key in _IN_PLACE:
                if isinstance(branches := member.get(key), list):
                    pending += branches
        return list(found.values())

    def _keep_open_what_must_be(self, family: Sequence[Schema]) -> None:
        is_shared = any(map(intersects, family))
        mentioned = _names_in(family)
        for member in family:
            names = mentioned if is_shared else _names_in([member])
            properties = _properties(member)
            at_least = member.get("minProperties", 0)
            if not names <= properties.keys() or not _is_count_within(at_least, len(properties)):
                self._open.add(id(member))

    def _below(self, family: Sequence[Schema], *, stays_open: bool) -> list[tuple[Schema, bool]]:
        """The schemas of parts of the value, and whether they stay open: where several speak of one part."""
        is_shared = stays_open or any(map(intersects, family))
        places: list[tuple[Hashable, Any]] = []
        for member in family:
            places += [(("properties", name), value) for name, value in _properties(member).items()]
            places += [(key, member[key]) for key in _SINGLE if key in member]
            for key in _LISTS:
                if isinstance(found := member.get(key), list):
                    places += [("items", item) for item in found]
            if isinstance(patterns := member.get("patternProperties"), dict):
                places += [("additionalProperties", value) for value in patterns.values()]
        counts = Counter(place for place, _ in places)
        return [
            (value, stays_open or (is_shared and (counts[place] > 1 or place == "additionalProperties")))
            for place, value in places
            if isinstance(value, dict) and not _LEADING_ON.isdisjoint(value)
        ]

    def _inexclusive_branches(self, schema: Schema) -> Iterable[Schema]:
        branches = schema.get("oneOf")
        if not isinstance(branches, list) or len(branches) < 2 or self._exclude_each_other(branches):
            return ()
        return [branch for branch in branches if isinstance(branch, dict)]

    def _exclude_each_other(self, branches: Sequence[Any]) -> bool:
        """Whether no value fits two of the branches, shown by their types or by a property with a tag."""
        resolved = [self._resolved(branch) for branch in branches]
        counts = Counter(kind for branch in resolved for kind in _types_of(branch))
        if any(count > 1 for kind, count in counts.items() if kind != "object"):
            return False
        objects = [branch for branch in resolved if "object" in _types_of(branch)]
        if len(objects) < 2:
            return True
        tags: list[dict[str, list[Any]]] = [
            {name: values for name in _required(branch) if (values := self._constants(branch, name))}
            for branch in objects
        ]
        for name in set(tags[0]).intersection(*tags[1:]):
            values = [{(isinstance(value, bool), value) for value in tag[name]} for tag in tags]
            if sum(map(len, values)) == len(set().union(*values)):
                return True
        return False

    def _constants(self, branch: Schema, name: str) -> list[Any]:
        """The texts and numbers that a property can have; none where they are not listed."""
        schema = self._resolved(_properties(branch).get(name))
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
            return []
        return values

    def _resolved(self, schema: Any) -> Schema:
        """Behind references that stand alone; {} for what is no object."""
        for _ in range(8):
            if not isinstance(schema, dict) or "$ref" not in schema or intersects(schema):
                break
            schema = target_of(self._root, schema["$ref"])
        return schema if isinstance(schema, dict) else {}


def _lists_properties(schema: Schema) -> bool:
    return isinstance(schema.get("properties"), dict) and not any(key in schema for key in _OPENERS)


def _properties(schema: Schema) -> dict[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}


def _required(schema: Schema) -> list[str]:
    found = schema.get("required")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _names_in(schemas: Iterable[Schema]) -> set[str]:
    return {name for schema in schemas for name in (*_properties(schema), *_required(schema))}


def _is_count_within(count: Any, most: int) -> bool:
    return isinstance(count, int | float) and count <= most


def _types_of(schema: Schema) -> frozenset[str]:
    """The types that a schema may admit; all, where it names none."""
    if "const" in schema:
        return frozenset({_type_of(schema["const"])})
    if isinstance(schema.get("enum"), list):
        return frozenset(map(_type_of, schema["enum"]))
    found = schema.get("type")
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return _TYPES
    return frozenset("number" if name == "integer" else name for name in names)


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"
