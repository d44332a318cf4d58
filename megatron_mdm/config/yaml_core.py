"""YAML by the core schema of its version 1.2, read strictly, and written so that readers of both versions agree.

PyYAML reads version 1.1, in which `no` is false, `010` is 8, `1:30` is 90 and `5e8` is text. Here `no` and `1:30` are
text, `010` is 10 and `5e8` a number. A key that stands twice is refused. Where the schema asks for text, a plain value
is the characters that were written: `mask_token: 1.0` is "1.0".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import yaml

from megatron_mdm.config import field_types
from megatron_mdm.config.errors import UserError

Key = tuple[str, ...]
Entries = dict[str, tuple[yaml.Node, yaml.Node]]  # by a key's text: the nodes of the key and of its value

_TAG = "tag:yaml.org,2002:"
_LARGEST = 100_000  # values of a document: aliases of aliases multiply
_LONGEST = 4000  # digits of a number; Python refuses more than 4,300
_CANONICAL = re.compile(r"0|-?[1-9][0-9]*")  # how token ids are written; any other spelling may be a token's text
_HASH = "\ue0b5"  # for private use: stands for "#" while an override is read, which has no comments
_PATTERNS = {  # by tag: the core schema's, and the characters with which a value may begin
    "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


def read_yaml(text: str, name: str, annotation: Any) -> tuple[Any, dict[Key, int]]:
    """The value of a document that is to fit an annotation of the schema, and the line of each of its keys.

    name: of the file, for messages. Raises UserError naming it and the line.
    """
    document = _Document(text, name)
    return document.value(annotation), document.lines


def read_override(text: str, name: str, annotation: Any) -> Any:
    """A value from the command line. Text is taken as it was typed, unless the whole of it stands in quotes.

    name: of the override, for messages. Raises UserError.
    """
    if _is_typed_text(text, annotation):
        return _plain(text, annotation, null_is_text=True)
    return _Override(text, name).value(annotation)


def dump_yaml(value: Any) -> str:
    """Mappings, lists and scalars as YAML. Texts that either version would read as something else are quoted."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without its own patterns, which are those of version 1.1."""


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, with the patterns of both versions."""


_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _PATTERNS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)


class _Document:
    """A text → PyYAML's nodes → values, with the schema's annotation beside each node."""

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.name = name
        self.lines: dict[Key, int] = {}
        self._number = 0  # of the values so far
        self._open: set[int] = set()  # nodes that are being read

    def value(self, annotation: Any) -> Any:
        try:
            node = yaml.compose(self.text, Loader=_Loader)
            return None if node is None else self._value(node, annotation, ())
        except yaml.MarkedYAMLError as error:
            problem = ", ".join(part for part in (error.context, error.problem) if part)
            raise self._invalid(problem, error.problem_mark or error.context_mark) from None
        except yaml.YAMLError as error:
            raise self._invalid(str(error)) from None
        except RecursionError:
            raise self._invalid("nested too deeply") from None

    def where(self, mark: yaml.Mark | None) -> str:
        return f"{self.name}, line {mark.line + 1}" if mark else self.name

    def written(self, text: str) -> str:
        """What the user wrote, of a part of the text."""
        return text

    def _invalid(self, problem: str, mark: yaml.Mark | None = None) -> UserError:
        return UserError(f"{self.where(mark)}: not valid YAML ({_one_line(self.written(problem))})")

    def _error(self, node: yaml.Node, what: str) -> UserError:
        return UserError(f"{self.where(node.start_mark)}: {self.written(what)}")

    def _value(self, node: yaml.Node, annotation: Any, key: Key) -> Any:
        with self._reading(node):
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, annotation, key)
            self._check_container(node, annotation, key)
            if isinstance(node, yaml.SequenceNode):
                parts = enumerate(node.value)
                return [self._value(part, field_types.of_element(annotation, index), key) for index, part in parts]
            values = {}
            for written, (at, value) in self._entries(node).items():
                name = self.written(written)
                self.lines[(*key, name)] = at.start_mark.line + 1
                values[name] = self._value(value, field_types.of_key(annotation, name), (*key, name))
            return values

    @contextmanager
    def _reading(self, node: yaml.Node) -> Iterator[None]:
        """Refuse aliases that never end, or that stand for more than a machine holds."""
        self._number += 1
        if self._number > _LARGEST:
            raise self._error(node, f"more than {_LARGEST:,} values, those included that aliases stand for")
        if id(node) in self._open:
            raise self._error(node, "an alias stands within what it names")
        self._open.add(id(node))
        yield
        self._open.remove(id(node))

    def _entries(self, node: yaml.Node) -> Entries:
        """What a mapping holds: its own keys, then those that `<<` brings."""
        entries: Entries = {}
        for at, value in node.value:
            if not isinstance(at, yaml.ScalarNode):
                raise self._error(at, "a key must be a text")
            if at.value in entries:
                first = entries[at.value][0].start_mark.line + 1
                raise self._error(at, f"key '{at.value}' stands here and in line {first}; keep one of them")
            entries[at.value] = at, value
        if "<<" not in entries or entries["<<"][0].tag != f"{_TAG}merge":
            return entries
        _, merged = entries.pop("<<")
        for part in merged.value if isinstance(merged, yaml.SequenceNode) else [merged]:
            if not isinstance(part, yaml.MappingNode):
                raise self._error(part, "'<<' takes a mapping, or a list of mappings")
            with self._reading(part):
                entries = {**self._entries(part), **entries}
        return entries

    def _scalar(self, node: yaml.ScalarNode, annotation: Any, key: Key) -> Any:
        """Plain values by the schema, quoted ones as text, tagged ones by their tag."""
        tag = node.tag.removeprefix(_TAG)
        text = self.written(node.value)
        if node.style is None and node.tag == _implicit(node.value):
            if tag == "null" and field_types.takes_text(annotation) and not field_types.takes_null(annotation):
                raise self._error(node, _null_for_text(text, key))
            return _plain(text, annotation)
        if tag not in _CONVERSIONS:
            raise self._error(node, f"the tag {node.tag} is unknown here; leave it out")
        if tag != "str" and _implicit(text) != node.tag:
            raise self._error(node, f"{text!r} is not of the type of its tag, {tag}")
        return _CONVERSIONS[tag](text)

    def _check_container(self, node: yaml.Node, annotation: Any, key: Key) -> None:
        """Brackets are often part of a text: `mask_token: [MASK]`."""
        if node.tag not in (f"{_TAG}seq", f"{_TAG}map"):
            raise self._error(node, f"the tag {node.tag} is unknown here; leave it out")
        is_list = isinstance(node, yaml.SequenceNode)
        fits = field_types.takes_lists(annotation) if is_list else field_types.takes_mappings(annotation)
        if fits or not field_types.takes_any_text(annotation):
            return
        kind = "list" if is_list else "mapping"
        written = _one_line(self.text[node.start_mark.index : node.end_mark.index])
        raise self._error(
            node, f"'{'.'.join(key)}': a {kind} stands where a text is expected; put it in quotes: '{written}'"
        )


class _Override(_Document):
    """A value on the command line: no lines, and no comments, so that "#" is a character like others."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text if _HASH in text else text.replace("#", _HASH), name)
        self.typed = text

    def where(self, mark: yaml.Mark | None) -> str:
        return self.name

    def written(self, text: str) -> str:
        return text if self.text is self.typed else text.replace(_HASH, "#")

    def _invalid(self, problem: str, mark: yaml.Mark | None = None) -> UserError:
        return UserError(f"{self.name}: the value is not YAML ({_one_line(self.written(problem))})")


def _is_typed_text(text: str, annotation: Any) -> bool:
    """Whether an override is text as it stands: not in quotes, and no list or mapping that would do, too."""
    if not field_types.takes_any_text(annotation) and field_types.takes_more_than_text(annotation):
        return False
    if text.startswith("[") and field_types.takes_lists(annotation):
        return False
    if text.startswith("{") and field_types.takes_mappings(annotation):
        return False
    return not _is_quoted(text)


def _is_quoted(text: str) -> bool:
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return False
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return False
    return isinstance(node, yaml.ScalarNode) and node.style == text[0]


def _plain(text: str, annotation: Any, null_is_text: bool = False) -> Any:
    """A value that was written without quotes, converted to what the annotation admits."""
    tag = _implicit(text).removeprefix(_TAG)
    if field_types.is_free(annotation):
        number = _CONVERSIONS[tag](text)
        is_exact = tag == "float" and "." not in text and abs(number) < 2**53 and number.is_integer()
        return int(number) if is_exact else number  # 5e8, where nothing says that it is no integer
    whole = field_types.takes_whole_numbers(annotation)
    fractions = field_types.takes_fractions(annotation)
    if tag in ("int", "float") and (whole or fractions):
        if field_types.takes_any_text(annotation) and not (fractions or _CANONICAL.fullmatch(text)):
            return text
        number = _CONVERSIONS[tag](text)
        is_whole = isinstance(number, float) and number.is_integer()
        return int(Decimal(text)) if is_whole and not fractions else number
    if field_types.takes_text(annotation) and (tag != "null" or null_is_text):
        return text
    if tag == "bool" and (whole or fractions) and not field_types.takes_bool(annotation):
        return text  # true is no number, although Python would count it as 1
    return _CONVERSIONS[tag](text)


def _null_for_text(text: str, key: Key) -> str:
    written, word = (f"'{text}'", f'; in quotes, "{text}" is a word') if text else ("nothing", "")
    return f"'{'.'.join(key)}': {written} stands where a text is expected; write '' for an empty one{word}"


def _implicit(text: str) -> str:
    """The tag of a plain value."""
    names = (name for name, (pattern, _) in _PATTERNS.items() if re.fullmatch(pattern, text))
    return f"{_TAG}{next(names, 'str')}"


def _whole(text: str) -> int | str:
    if len(text) > _LONGEST:
        return text
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _fraction(text: str) -> float:
    return float(text.replace(".", "") if text[-1].isalpha() else text)  # .inf, .nan


_CONVERSIONS: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
    "int": _whole,
    "float": _fraction,
    "merge": str,  # a text where it is no key
    "str": str,
}


def _one_line(text: str) -> str:
    return " ".join(text.split())
