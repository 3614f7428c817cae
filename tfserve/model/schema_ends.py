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


def has_finite_text(schema: Any) -> bool:
    """False if no finite JSON text can satisfy `schema`; true where that is not certain.

    A least fixed point over the schema's parts: a part has a text once each of its requirements does, and a requirement
    does once one of its alternatives does. Time is linear in the size of the schema.
    """
    parts: list[Any] = [schema]
    places = {id(schema): 0}
    num_open: list[int] = []  # by part: requirements without a text so far
    waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by part: the requirements, by (part, number)
    for place, part in enumerate(parts):  # grows meanwhile
        requirements = _requirements(part, schema)
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


def _requirements(part: Any, root: Any) -> list[Sequence[Any]]:
    """What a text needs to satisfy `part`: each is a list of schemas, of which it must satisfy one, in whole or within.

    Only what holds for certain: a schema without a type, for one, is also satisfied by a number.
    """
    if part is False:
        return [[]]
    if not isinstance(part, Mapping) or ("$id" in part and part is not root):
        return []
    requirements: list[Sequence[Any]] = [[each] for each in _list(part, "allOf")]
    requirements += [_list(part, key) for key in ("anyOf", "oneOf") if _list(part, key)]
    if isinstance(part.get("$ref"), str):
        requirements.append([_target(root, part["$ref"])])
    kind = part.get("type")
    if kind in ("object", ["object"]):
        requirements += [[_member(part, name)] for name in _list(part, "required")]
        if _least(part, "minProperties") > len(_mapping(part, "properties")):
            requirements.append(_more_members(part))
    elif kind in ("array", ["array"]):
        requirements += [[item] for item in _first_items(part)]
    return requirements


def _list(part: Mapping[str, Any], key: str) -> list[Any]:
    value = part.get(key)
    return value if isinstance(value, list) else []


def _mapping(part: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = part.get(key)
    return value if isinstance(value, Mapping) else {}


def _member(part: Mapping[str, Any], name: Any) -> Any:
    """What the member `name` of an object must satisfy."""
    properties = _mapping(part, "properties")
    if isinstance(name, str) and name in properties:
        return properties[name]
    return _ANYTHING if "patternProperties" in part else part.get("additionalProperties", _ANYTHING)


def _more_members(part: Mapping[str, Any]) -> list[Any]:
    """What the members of an object beyond `properties` may satisfy."""
    return [*_mapping(part, "patternProperties").values(), part.get("additionalProperties", _ANYTHING)]


def _first_items(part: Mapping[str, Any]) -> list[Any]:
    """What the items that an array must have must satisfy; of those beyond `prefixItems`, the first stands for all."""
    least = _least(part, "minItems")
    prefix = _list(part, "prefixItems")
    return prefix[:least] + ([part.get("items", _ANYTHING)] if least > len(prefix) else [])


def _least(part: Mapping[str, Any], key: str) -> int:
    value = part.get(key)
    return max(value, 0) if isinstance(value, int) else 0


def _target(root: Any, reference: str) -> Any:
    """The schema that a reference within the document names."""
    if reference == "#":
        return root
    if not reference.startswith("#/"):
        return _ANYTHING
    found = root
    for step in unquote(reference[2:]).split("/"):
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return _ANYTHING
    return found
