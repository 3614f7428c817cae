"""Whether any finite JSON text satisfies a JSON schema that refers to itself. Torch-free.

llguidance finds the contradictions within a schema, but follows its references only as a text is written. A schema that
always requires one more level of itself is served, and its texts have no end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

_ANYTHING = True
"""The schema that every text satisfies; stands for what this module does not follow."""

_MAX_TOGETHER = 32
"""Schemas looked at together with one: what is split among more is not followed, so that the time stays linear."""


def has_finite_text(schema: Any) -> bool:
    """False if no finite JSON text can satisfy `schema`; true where that is not certain.

    A least fixed point over the schema's parts: a part has a text once each of its requirements does, and a requirement
    does once one of its alternatives does. Time is linear in the size of the schema.
    """
    document = SchemaDocument(schema)
    parts: list[Any] = [schema]
    places = {id(schema): 0}
    num_open: list[int] = []  # by part: requirements without a text so far
    waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by part: the requirements, by (part, number)
    for place, part in enumerate(parts):  # grows meanwhile
        requirements = _requirements(part, document)
        num_open.append(len(requirements))
        for number, alternatives in enumerate(requirements):
            for alternative in alternatives:
                if id(alternative) not in places:
                    places[id(alternative)] = len(parts)
                    parts.append(alternative)
                waiting[places[id(alternative)]].append((place, number))
    done = [place for place, left in enumerate(num_open) if left == 0]
    met: set[tuple[int, int]] = set()
    while done:
        for place, number in waiting[done.pop()]:
            if (place, number) not in met:
                met.add((place, number))
                num_open[place] -= 1
                if num_open[place] == 0:
                    done.append(place)
    return num_open[0] == 0


def _requirements(part: Any, document: SchemaDocument) -> list[Sequence[Any]]:
    """What a text needs to satisfy `part`: each is a list of schemas, of which it must satisfy one, in whole or within.

    Only what holds for certain: a schema without a type, for one, is also satisfied by a number.
    """
    if part is False:
        return [[]]
    if not isinstance(part, Mapping) or document.is_foreign(part):
        return []
    requirements: list[Sequence[Any]] = [[each] for each in _list(part, "allOf")]
    requirements += [_list(part, key) for key in ("anyOf", "oneOf") if _list(part, key)]
    if isinstance(part.get("$ref"), str):
        requirements.append([document.target(part["$ref"])])
    together = _together(part, document)
    kinds = [each["type"] if isinstance(each["type"], list) else [each["type"]] for each in together if "type" in each]
    if any(kind and all(name == "object" for name in kind) for kind in kinds):
        for name in {name for each in together for name in _list(each, "required") if isinstance(name, str)}:
            requirements += [_member(each, name) for each in together]
        for each in together:
            if _least(each, "minProperties") > len(_mapping(each, "properties")):
                requirements.append(_other_members(each))
    elif any(kind and all(name == "array" for name in kind) for kind in kinds):
        least = max(_least(each, "minItems") for each in together)
        requirements += [[item] for each in together for item in _first_items(each, least)]
    return requirements


def _together(part: Mapping[str, Any], document: SchemaDocument) -> list[Mapping[str, Any]]:
    """`part` and the schemas that each text of it satisfies too: `type` may stand in one and `required` in another."""
    found, known = [part], {id(part)}
    if "allOf" not in part:
        # What a reference alone stands for is looked at there.
        return found
    for each in found:  # grows meanwhile
        others = _list(each, "allOf") + ([document.target(each["$ref"])] if isinstance(each.get("$ref"), str) else [])
        for other in others:
            if len(found) == _MAX_TOGETHER:
                return found
            if isinstance(other, Mapping) and id(other) not in known and not document.is_foreign(other):
                known.add(id(other))
                found.append(other)
    return found


def _list(part: Mapping[str, Any], key: str) -> list[Any]:
    value = part.get(key)
    return value if isinstance(value, list) else []


def _mapping(part: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = part.get(key)
    return value if isinstance(value, Mapping) else {}


def _member(part: Mapping[str, Any], name: str) -> list[Any]:
    """The schemas of which the member `name` of an object must satisfy one."""
    properties = _mapping(part, "properties")
    return [properties[name]] if name in properties else _other_members(part)


def _other_members(part: Mapping[str, Any]) -> list[Any]:
    """What the members of an object beyond `properties` may satisfy."""
    return [*_mapping(part, "patternProperties").values(), part.get("additionalProperties", _ANYTHING)]


def _first_items(part: Mapping[str, Any], least: int) -> list[Any]:
    """What the first `least` items of an array must satisfy; of those beyond the listed ones, the first stands for all.

    Drafts before 2020-12 list them as `items`, and what comes after as `additionalItems`.
    """
    listed, others = _list(part, "prefixItems"), part.get("items", _ANYTHING)
    if isinstance(others, list):
        listed, others = others, part.get("additionalItems", _ANYTHING)
    return listed[:least] + ([others] if least > len(listed) else [])


def _least(part: Mapping[str, Any], key: str) -> int:
    value = part.get(key)
    return max(value, 0) if isinstance(value, int) else 0


class SchemaDocument:
    """A whole schema: what the references within it name."""

    def __init__(self, root: Any) -> None:
        self._root = root
        own = root.get("$id") if isinstance(root, Mapping) else None
        self._base = own.removesuffix("#") if isinstance(own, str) else ""
        self._anchors: dict[str, Any] = {}
        self._found: dict[str, Any] = {}  # by reference
        rest = [root]
        while rest:
            part = rest.pop()
            if isinstance(part, Mapping):
                if isinstance(part.get("$anchor"), str):
                    # Of two with one name, which is meant is not certain.
                    self._anchors[part["$anchor"]] = _ANYTHING if part["$anchor"] in self._anchors else part
                rest += part.values()
            elif isinstance(part, list):
                rest += part

    def is_foreign(self, part: Mapping[str, Any]) -> bool:
        """True for a schema within this one that references name in another way."""
        return "$id" in part and part is not self._root

    def target(self, reference: str) -> Any:
        """The schema that a reference names."""
        if reference not in self._found:
            self._found[reference] = self._look_up(reference)
        return self._found[reference]

    def _look_up(self, reference: str) -> Any:
        base, _, fragment = reference.partition("#")
        if base not in ("", self._base):
            return _ANYTHING
        if fragment and not fragment.startswith("/"):
            return self._anchors.get(fragment, _ANYTHING)
        found = self._root
        for step in unquote(fragment).split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdecimal() and len(key) < 10 and int(key) < len(found):
                found = found[int(key)]
            else:
                return _ANYTHING
        return found
