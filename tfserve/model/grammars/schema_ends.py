"""Checks whether a finite JSON text satisfies a recursive JSON schema. Torch-free.

llguidance finds contradictions within a schema, but follows references only while a text is generated. It accepts a
schema that always requires one more level of itself, whose texts never end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

_ANYTHING = True
"""The schema that every text satisfies, used for everything that this module does not follow."""

_MAX_TOGETHER = 32
"""Most schemas that are combined with one; further ones are not followed, so that the time stays linear."""


def has_finite_text(schema: Any) -> bool:
    """False if no finite JSON text can satisfy `schema`; true where that is not certain.

    Computes a least fixed point over the schema's parts: a part has a text if each of its requirements has one, and a
    requirement has one if one of its alternatives has. Time is linear in the size of the schema.
    """
    document = SchemaDocument(schema)
    parts: list[Any] = [schema]
    places = {id(schema): 0}
    num_open: list[int] = []  # by part: number of requirements without a text so far
    waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by part: dependent requirements, as (part, number)
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
    """The requirements of `part`: each is a list of schemas, and a text or a part of it must satisfy one of them.

    Only certain requirements: for example, a number also satisfies a schema without a type.
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
    """`part` and the schemas that apply to the same text: `type` may be in one of them and `required` in another."""
    found, known = [part], {id(part)}
    if "allOf" not in part:
        # A schema that is only a reference is evaluated at its target.
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
    """Alternatives for the member `name` of an object."""
    properties = _mapping(part, "properties")
    return [properties[name]] if name in properties else _other_members(part)


def _other_members(part: Mapping[str, Any]) -> list[Any]:
    """Alternatives for members of an object that are not in `properties`."""
    return [*_mapping(part, "patternProperties").values(), part.get("additionalProperties", _ANYTHING)]


def _first_items(part: Mapping[str, Any], least: int) -> list[Any]:
    """Requirements of the first `least` items of an array; one stands for all items beyond the listed ones.

    Drafts before 2020-12 list them as `items`, and the schema of the others as `additionalItems`.
    """
    listed, others = _list(part, "prefixItems"), part.get("items", _ANYTHING)
    if isinstance(others, list):
        listed, others = others, part.get("additionalItems", _ANYTHING)
    return listed[:least] + ([others] if least > len(listed) else [])


def _least(part: Mapping[str, Any], key: str) -> int:
    value = part.get(key)
    return max(value, 0) if isinstance(value, int) else 0


class SchemaDocument:
    """A whole schema; resolves the references within it."""

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
                    # Two schemas with the same name are ambiguous.
                    self._anchors[part["$anchor"]] = _ANYTHING if part["$anchor"] in self._anchors else part
                rest += part.values()
            elif isinstance(part, list):
                rest += part

    def is_foreign(self, part: Mapping[str, Any]) -> bool:
        """True for a subschema that references may name in another way."""
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
