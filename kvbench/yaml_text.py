"""A YAML text whose every value knows its line and column, and messages that point at them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml

from kvbench.files import read_text
from kvbench.messages import path_text

Loc = tuple[str | int, ...]

# far more than a person writes, and read in a fraction of a second
MAX_BYTES = 2**17
MAX_NODES = 5000
MAX_LEVELS = 40
MAX_DIGITS = 40
MAX_WIDTH = 200  # of a line that is shown

KIND = "tag:yaml.org,2002:"
KINDS = {
    "null": "nothing",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "timestamp": "a date",
}
# as every version of YAML reads them
PLAIN = {
    "int": re.compile(rf"[-+]?(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})"),
    "float": re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where, what, and what was expected."""


class Loader(yaml.SafeLoader):
    """YAML without its traps, each an error at its place.

    No number in a notation that another version of YAML reads otherwise (010 is 8 or 10, 1:30 is 90 or a text), no
    date, no key that is not text, nothing that holds itself, and no more levels and nodes, aliases written out, than a
    person writes.
    """

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(KIND) in {*KINDS, "str", "seq", "map"}
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.levels = 0  # of the node that is being read
        self.sizes: dict[int, tuple[int, int]] = {}  # levels and nodes of each that was read, by its id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, with all below it."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self.levels += 1
        if self.levels > MAX_LEVELS:
            raise refused(f"more than {MAX_LEVELS} levels, one in another", event.start_mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        if node is None or id(node) in self.sizes:
            return node
        if isinstance(event, yaml.AliasEvent):
            raise refused(f"*{event.anchor} stands inside what it is the name of", event.start_mark)
        if len(self.sizes) >= MAX_NODES:
            raise refused(f"more than {MAX_NODES} values", event.start_mark)
        below = [self.sizes[id(one)] for one in parts(node)]
        levels = 1 + max((levels for levels, _ in below), default=0)
        nodes = 1 + sum(nodes for _, nodes in below)
        self.sizes[id(node)] = levels, nodes
        if levels > MAX_LEVELS or nodes > MAX_NODES:
            raise refused(f"more than {MAX_LEVELS} levels or {MAX_NODES} values, aliases written out", event.start_mark)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """The next scalar, where all readers of YAML agree what it is."""
        node = super().compose_scalar_node(anchor)
        if re.search("[\ud800-\udfff]", node.value):
            try:  # JSON writes one character as two halves
                node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise refused("half a character", node.start_mark) from None
        kind = node.tag.removeprefix(KIND)
        if kind not in KINDS:
            return node
        value = node.value if len(node.value) <= MAX_DIGITS else f"{node.value[:MAX_DIGITS]}…"
        if self.resolve(yaml.ScalarNode, node.value, (True, False)) != node.tag:  # type: ignore[no-untyped-call]
            raise refused(f"'{value}' is not {KINDS[kind]}", node.start_mark)
        if kind == "timestamp":
            raise refused(f"{value} is a date to YAML; a text stands in quotes", node.start_mark)
        if kind in PLAIN and not PLAIN[kind].fullmatch(node.value):
            what = f"at most {MAX_DIGITS} decimal digits, none of them a leading 0" if kind == "int" else "as 0.5"
            raise refused(f"{value} is no plain number: write {what}, and a text in quotes", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The next mapping, if its keys are text; a whole number, such as a layer's, is read as its digits."""
        node = super().compose_mapping_node(anchor)
        for key, _ in node.value:
            if key.tag == f"{KIND}int":
                key.tag = f"{KIND}str"
            if key.tag not in (f"{KIND}str", f"{KIND}merge"):
                raise refused("a key is text: put it in quotes", key.start_mark)
        return node


def parts(node: yaml.Node) -> Iterator[yaml.Node]:
    """The nodes that a node holds itself."""
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


class Trap(yaml.MarkedYAMLError):
    """A text that is YAML, but not one that is read here."""


def refused(problem: str, mark: Any) -> Trap:
    """What is wrong with the YAML, and where."""
    return Trap(problem=problem, problem_mark=mark)


@dataclass(frozen=True)
class Document:
    """A YAML text with its node tree, which knows lines and columns."""

    name: str
    text: str
    root: yaml.Node
    overridden: dict[Loc, str]  # what `--set` put where

    def locate(self, loc: Loc, key: bool = False) -> tuple[yaml.Mark, yaml.Mark, Loc]:
        """Start and end of the deepest node on the way to `loc`, and how far that is; with `key`, of the last key."""
        node, reached = self.root, 0
        for depth, step in enumerate(loc):
            last = key and depth == len(loc) - 1
            found = child(node, step, last)
            if found is None:
                break
            node, reached = found, depth + 1
        return node.start_mark, node.end_mark, loc[:reached]

    def message(self, loc: Loc, text: str, key: bool = False) -> str:
        """`file:line:column: path: text`, the line itself, and carets under the place."""
        for place, argument in self.overridden.items():
            if loc and (loc[: len(place)] == place or place[: len(loc)] == loc):
                return f"--set {argument}: {text}"
        start, end, reached = self.locate(loc, key)
        shown_loc = loc[:-1] if key else (reached or loc)
        where = f"{path_text(shown_loc)}: " if shown_loc else ""
        if not reached:
            return f"{self.name}:{start.line + 1}:{start.column + 1}: {where}{text}"
        return f"{self.name}:{start.line + 1}:{start.column + 1}: {where}{text}\n{self.excerpt(start, end)}"

    def message_near(self, loc: Loc, text: str) -> str:
        """`message` at the key or value below `loc` that the text names first or quotes, else at `loc` itself."""
        _, _, reached = self.locate(loc)
        node: yaml.Node | None = self.root
        for step in reached:
            node = child(node, step) if node is not None else None
        # "window: …" is about the key `window`
        head, colon, rest = text.partition(": ")
        if colon and reached and reached[-1] == head:
            return self.message_near(loc, rest)
        if colon and node is not None and child(node, head) is not None:
            return self.message_near((*reached, head), rest)
        quoted = re.search(r"'([^']+)'", text)
        found = quoting(node, quoted[1]) if quoted and node is not None else None
        return self.message((*reached, *found[0]), text, key=found[1]) if found else self.message(reached or loc, text)

    def line(self, loc: Loc) -> int:
        """Where `loc` begins, for sorting."""
        return self.locate(loc)[0].line

    def excerpt(self, start: yaml.Mark, end: yaml.Mark) -> str:
        """The source line of a mark with carets under it."""
        lines = self.text.splitlines()
        line = lines[start.line].rstrip() if start.line < len(lines) else ""
        width = end.column - start.column if end.line == start.line else len(line) - start.column
        # of a line that no screen holds, the part with the place
        first = 0 if len(line) <= MAX_WIDTH else max(0, start.column - MAX_WIDTH // 2)
        seen, column = line[first : first + MAX_WIDTH], start.column - first
        prefix = f"{start.line + 1:>5} | "
        # tabs keep their width under the line
        indent = re.sub(r"[^\t]", " ", seen[:column])
        carets = "^" * max(1, min(width, len(seen) - column))
        return f"{prefix}{seen}\n{' ' * (len(prefix) - 2)}| {indent}{carets}"


def quoting(node: yaml.Node, text: str) -> tuple[Loc, bool] | None:
    """Where below a node a text stands, as a key (True) or a value, or a part of one such as `center+hadamard:none`."""
    if isinstance(node, yaml.ScalarNode):
        return ((), False) if text in (node.value, *re.split(r"[+:]", node.value)) else None
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(None, item) for item in parts(node)]
    for index, (key, value) in enumerate(pairs):
        if key is not None and key.value == text:
            return (key.value,), True
        if found := quoting(value, text):
            return (index if key is None else key.value, *found[0]), found[1]
    return None


def child(node: yaml.Node, step: str | int, key: bool = False) -> yaml.Node | None:
    """The node below `node` at a key or index, or (with `key`) the node of the key itself."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return cast(yaml.Node, node.value[step])
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(step):
                return cast(yaml.Node, name if key else value)
    return None


def read_document(text: str, name: str, expected: str) -> tuple[Document, dict[str, Any]]:
    """The node tree and the data of a YAML text. expected: what stands in it at least, in words.

    Raises:
        ConfigError: it is no YAML, is empty, is no mapping, or has a key twice.
    """
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{name}: the file is empty; {expected}")
        document = Document(name, text, root, {})
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(document.message((), f"expected a mapping: {expected}"))
        twice = list(duplicate_keys(document, root))
        if twice:
            raise ConfigError("\n".join(twice))
        data = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(syntax_message(text, name, error)) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ConfigError(
            f"{name}:{line}:{column}: not YAML: the character U+{ord(text[error.position]):04X}, which no file shows"
        ) from None
    return document, data


def syntax_message(text: str, name: str, error: yaml.MarkedYAMLError) -> str:
    """One message for a text that is no YAML."""
    mark = error.problem_mark or error.context_mark
    problem = (error.problem or "not YAML").removeprefix("but ")
    if "\\t" in problem:
        problem = "a tab: YAML is indented with spaces"
    elif error.context and not problem.startswith("could not determine"):
        problem = f"{problem} ({error.context})"
    if mark is None:
        return f"{name}: {problem}"
    excerpt = Document(name, text, yaml.ScalarNode("", ""), {}).excerpt(mark, mark)
    return f"{name}:{mark.line + 1}:{mark.column + 1}: {problem}\n{excerpt}"


def duplicate_keys(document: Document, root: yaml.Node) -> Iterator[str]:
    """A message for each key that appears twice in one mapping: YAML itself would keep the last."""
    pending: list[tuple[yaml.Node, Loc]] = [(root, ())]
    seen: set[int] = set()
    while pending:
        node, loc = pending.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += [(item, (*loc, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            first: dict[str, yaml.Node] = {}
            for key, value in node.value:
                if key.value in first and isinstance(key, yaml.ScalarNode):
                    start, end = key.start_mark, key.end_mark
                    line = first[key.value].start_mark.line + 1
                    yield (
                        f"{document.name}:{start.line + 1}:{start.column + 1}: {path_text((*loc, key.value))}: "
                        f"this key appears twice, first in line {line}\n{document.excerpt(start, end)}"
                    )
                first.setdefault(str(key.value), key)
                pending.append((value, (*loc, str(key.value))))


def read_file(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        ConfigError: it isn't there, is no text, or is far longer than one that a person writes.
    """
    try:
        return read_text(path, MAX_BYTES)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f": did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"no file {path}{hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


# ---- --set


def apply_setting(data: Any, setting: str) -> Loc:
    """Puts the value of `tasks[0].limit=50` in its place in `data`; returns the place.

    Raises:
        ConfigError: it has no value, or there is no such place.
    """
    path, equals, text = setting.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+|\[[0-9]{1,9}\]){0,9}", path):
        raise ConfigError(f"--set {setting}: expected KEY=VALUE, such as tasks[0].limit=50")
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        why = f": {error.problem}" if isinstance(error, Trap) else ""
        raise ConfigError(f"--set {setting}: '{text}' is not a YAML value{why}") from None
    loc: Loc = tuple(int(part[1:-1]) if part.startswith("[") else part for part in re.findall(r"\[\d+\]|\w+", path))
    parent: Any = data
    for depth, step in enumerate(loc):
        last = depth == len(loc) - 1
        if isinstance(parent, dict) and isinstance(step, str):
            if last:
                parent[step] = value
                return loc
            if parent.get(step) is None:
                parent[step] = {}
            elif isinstance(parent[step], str) and isinstance(loc[depth + 1], str):
                parent[step] = as_mapping(step, parent[step])
            parent = parent[step]
        elif isinstance(parent, list) and isinstance(step, int) and step < len(parent):
            if last:
                parent[step] = value
                return loc
            if isinstance(parent[step], str):
                parent[step] = as_mapping(str(loc[depth - 1]), parent[step])
            parent = parent[step]
        else:
            count = len(parent) if isinstance(parent, list) else 0
            size = f"; the list has {count} {'entry' if count == 1 else 'entries'}" if count else ""
            raise ConfigError(f"--set {setting}: there is no {path_text(loc[: depth + 1])}{size}")
    raise AssertionError("the last step returns")


def as_mapping(parent: str, name: str) -> dict[str, Any]:
    """The long form of an entry that was written as a name alone."""
    return {{"tasks": "task", "dtypes": "dtype"}.get(parent, "name"): name}
