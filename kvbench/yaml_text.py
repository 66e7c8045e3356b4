"""A YAML text whose every value knows its line and column, and messages that point at them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import yaml

from kvbench.messages import path_text

Loc = tuple[str | int, ...]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where, what, and what was expected."""


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
        """`message` at the key or value below `loc` that the text quotes, else at `loc` itself."""
        _, _, reached = self.locate(loc)
        node: yaml.Node | None = self.root
        for step in reached:
            node = child(node, step) if node is not None else None
        quoted = re.search(r"'([^']+)'", text)
        if quoted and isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == quoted[1]:
                    return self.message((*reached, key.value), text, key=True)
                if value.value == quoted[1]:
                    return self.message((*reached, key.value), text)
        return self.message(reached or loc, text)

    def line(self, loc: Loc) -> int:
        """Where `loc` begins, for sorting."""
        return self.locate(loc)[0].line

    def excerpt(self, start: yaml.Mark, end: yaml.Mark) -> str:
        """The source line of a mark with carets under it."""
        lines = self.text.splitlines()
        line = lines[start.line] if start.line < len(lines) else ""
        width = end.column - start.column if end.line == start.line else len(line.rstrip()) - start.column
        prefix = f"{start.line + 1:>5} | "
        # tabs keep their width under the line
        indent = re.sub(r"[^\t]", " ", line[: start.column])
        return f"{prefix}{line.rstrip()}\n{' ' * (len(prefix) - 2)}| {indent}{'^' * max(1, width)}"


def child(node: yaml.Node, step: str | int, key: bool = False) -> yaml.Node | None:
    """The node below `node` at a key or index, or (with `key`) the node of the key itself."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return cast(yaml.Node, node.value[step])
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(step):
                return cast(yaml.Node, name if key else value)
    return None


def read_document(text: str, name: str) -> tuple[Document, dict[str, Any]]:
    """The node tree and the data of a YAML text.

    Raises:
        ConfigError: it is no YAML, is empty, is no mapping, or has a key twice.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{name}: the file is empty; a sweep has at least name, model, dtypes and tasks")
        document = Document(name, text, root, {})
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(document.message((), "expected a mapping with name, model, dtypes and tasks"))
        twice = list(duplicate_keys(document, root))
        if twice:
            raise ConfigError("\n".join(twice))
        data = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(syntax_message(text, name, error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
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
    """A message for each key that stands twice in one mapping: YAML itself would keep the last."""
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
                        f"this key stands twice, first in line {line}\n{document.excerpt(start, end)}"
                    )
                first.setdefault(str(key.value), key)
                pending.append((value, (*loc, str(key.value))))


# ---- --set


def apply_setting(data: Any, setting: str) -> Loc:
    """Puts the value of `tasks[0].limit=50` in its place in `data`; returns the place.

    Raises:
        ConfigError: it has no value, or there is no such place.
    """
    path, equals, text = setting.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+|\[\d+\])*", path):
        raise ConfigError(f"--set {setting}: expected KEY=VALUE, such as tasks[0].limit=50")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {setting}: '{text}' is not a YAML value") from None
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
