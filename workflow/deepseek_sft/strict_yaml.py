"""YAML (and JSON) that a person wrote, read so that nothing in it is taken for something else in silence.

YAML 1.1, as PyYAML and so Snakemake read it, lets the later of two equal keys win, takes ``0777`` for 511, ``1:30`` for
90, ``no:`` for a key that is false, and a date for a date. Here such a value is refused, with its line and what to
write instead. What passes is read as Snakemake reads it.
"""

import json
import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

MOST_NODES = 100_000  # of a file whose aliases are written out; larger ones are bombs
MOST_LEVELS = 100
_PLAIN = (dict, list, str, int, float, bool, type(None))
_KINDS = {bool: "true or false", type(None): "null", int: "a number", float: "a number"}
_COMPUTED = ("__use_yte__", "__variables__", "__definitions__")  # yte, which Snakemake would run


class Refused(Exception):
    """A value that is not what it seems.

    Args:
        problem: what it is.
        fix: what to write.
        mark: where; None where that is not known.
    """

    def __init__(self, problem: str, fix: str, mark: yaml.Mark | None = None):
        super().__init__(problem)
        self.problem, self.fix, self.mark = problem, fix, mark


def load(text: str) -> Any:
    """What a text holds: dictionaries with text as keys, lists, texts, finite numbers, booleans, None.

    Raises:
        Refused: a value that would be taken for another, or one that is too large.
        yaml.YAMLError: no YAML.
    """
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant, parse_int=_whole, parse_float=_real)
    except (ValueError, RecursionError):
        pass  # as Snakemake does: what is no JSON is YAML
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError:
        raise Refused(f"is nested more than {MOST_LEVELS} levels deep", "write it flatter") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:  # `!!bool maybe`, `!!int ""`
        raise Refused(f"a tag (!!…) before a value that it does not fit: {error}", "write it without the tag") from None
    finally:
        loader.dispose()


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: set[str] = set()
    for key, _ in pairs:
        _no_template(key, None)
        if key in seen:
            raise Refused(f"the key {key!r} stands there twice, and the later one would win", "keep one of them")
        seen.add(key)
    return dict(pairs)


def _constant(word: str) -> float:
    raise Refused(f"{word} is no number that a setting can have", "write a number, or null where that is allowed")


def _whole(digits: str) -> int:
    if len(digits) > 40:
        raise Refused(f"a number of {len(digits)} digits", "write a smaller one")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Refused(f"{digits[:40]} is too large for a number", "write a smaller one")
    return value


def _no_template(key: Any, mark: yaml.Mark | None) -> None:
    if key in _COMPUTED:
        raise Refused(f"{key} makes the file a template that runs Python", "write the values themselves", mark)


def _measure(node: yaml.Node, known: dict[int, int], level: int) -> int:
    """Number of nodes below one, aliases written out."""
    if level > MOST_LEVELS:
        raise Refused(f"is nested more than {MOST_LEVELS} levels deep", "write it flatter", node.start_mark)
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # of a node that holds itself
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = inner if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(_measure(part, known, level + 1) for part in parts)
    if known[id(node)] > MOST_NODES:
        fix = "write out what you mean, without anchors"
        raise Refused(f"its aliases make more than {MOST_NODES} values of it", fix, node.start_mark)
    return known[id(node)]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what is not what it seems."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, yaml.Mark] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            mark = key_node.start_mark
            if not isinstance(key, str):
                written = getattr(key_node, "value", "")
                shown = f"`{written}`" if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                kind = _KINDS.get(type(key), "no text")
                raise Refused(f"the key {shown} is {kind}, and keys are text", f'quote it: "{key}":', mark)
            _no_template(key, mark)
            if key in seen:
                first = f"first in line {seen[key].line + 1}"
                problem = f"the key `{key}` stands there twice ({first}), and the later one would win"
                raise Refused(problem, "keep one of them, or join what is below both", mark)
            seen[key] = mark
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode):
            _refuse_scalar(node)
        value = super().construct_object(node, deep=deep)
        if not isinstance(value, _PLAIN) and not hasattr(value, "__next__"):  # a generator is filled in later
            raise Refused(f"a value of type {type(value).__name__}", "write text, a number or a list", node.start_mark)
        return value


def _refuse_scalar(node: yaml.ScalarNode) -> None:
    kind, written, mark = node.tag.rpartition(":")[2], node.value, node.start_mark
    quoted = f'write "{written}" with quotation marks if text is meant'
    if kind in ("timestamp", "binary"):
        raise Refused(f"`{written[:40]}` is read as a {'date' if kind == 'timestamp' else kind}", quoted, mark)
    if kind not in ("int", "float"):
        return
    if ":" in written:
        raise Refused(f"`{written[:40]}` is read as a number to the base of 60", quoted, mark)
    if kind == "int" and re.fullmatch(r"[-+]?0[0-9_]+", written):
        decimal = written.replace("_", "").lstrip("+-0") or "0"
        raise Refused(f"`{written}` is read as an octal number", f"write {decimal}, or {quoted[6:]}", mark)
    if re.fullmatch(r"[-+]?\.(inf|nan)", written, re.IGNORECASE):
        _nothing = "write a number, or null where that switches a bound off"
        raise Refused(f"`{written}` is no number that a setting can have", _nothing, mark)
    if len(written) > 40:
        raise Refused(f"a number of {len(written)} digits", "write a smaller one", mark)
    if kind == "float" and not _finite(written):
        raise Refused(f"`{written}` is too large for a number", "write a smaller one", mark)


def _finite(written: str) -> bool:
    try:
        return math.isfinite(float(written.replace("_", "")))
    except ValueError:
        return True  # an explicit !!float before a text: the loader refuses it
