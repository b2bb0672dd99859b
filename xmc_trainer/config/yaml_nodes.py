"""YAML files that people write: read without a guess at types, for scalars keep their source text, and nothing is constructed.

YAML decides by a word's looks what it is: `2026_1_11` is a number, `on` a truth value, `12:30:00` a number of base 60. Here
whoever knows what a word is for decides. Errors name the file and the line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from xmc_trainer.errors import UserError, shown

_MOST_BYTES = 1 << 18
_DEEPEST = 20
# What YAML makes of a scalar without a tag. Others were written on purpose, such as !!binary or !!python/object.
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
}


class _Loader(yaml.SafeLoader):
    """Refuses deep nesting, which would end Python's stack. Aliases stay one node, so they cannot multiply."""

    depth = 0

    def compose_node(self, parent: Node | None, index: object) -> Node:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_file(path: Path, what: str) -> Node | None:
    """The document in a file; None if it is empty. UserError where it cannot be read; `what` says what the file is."""
    content, problem = b"", "not a file"
    try:
        if path.is_file() or not path.exists():  # a pipe could be waited for without end
            with path.open("rb") as file:
                content, problem = file.read(_MOST_BYTES + 1), ""
    except OSError as error:
        problem = str(error.strerror)
    except ValueError:
        problem = "no file can have this name"
    if problem:
        raise UserError(f"{path}: {problem}; name a YAML file of {what}")
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path}: larger than {_MOST_BYTES >> 10} KiB; name a YAML file of {what}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8; convert the file") from None
    return parse(text, str(path))


def parse(text: str, where: str) -> Node | None:
    """The one document in `text`; None if there is nothing in it. UserError names `where` and the line."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        said = " ".join(part for part in (error.context, error.problem) if part)
    except yaml.reader.ReaderError as error:
        line = f", line {text[: error.position].count(chr(10)) + 1}"
        said = f"holds the character U+{ord(text[error.position]):04X}, which YAML does not allow"
    except (ValueError, OverflowError) as error:  # such as an escape beyond the last code point
        line, said = "", str(error)
    raise UserError(f"{where}{line}: not YAML: {said}; correct it")


def place(node: Node, where: str) -> str:
    """Where a node stands, for a message."""
    return f"{where}, line {node.start_mark.line + 1}"


def entries(node: Node, where: str) -> Iterator[tuple[str, Node]]:
    """(key, value) of a mapping. UserError for a key that comes twice, or is not a word."""
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        key = scalar(key_node, where)
        if key in seen:
            raise UserError(
                f"{place(key_node, where)}: {shown(key)} stands there twice, first in line {seen[key]}; remove one"
            )
        seen[key] = key_node.start_mark.line + 1
        yield key, value


def scalar(node: Node, where: str) -> str:
    """The source text of a scalar, without its quotes. UserError if the node is something else."""
    if not isinstance(node, ScalarNode):
        raise UserError(
            f"{place(node, where)}: a {kind(node)} where a single word is needed; put it in quotes if it is text"
        )
    if node.tag not in _PLAIN_TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise UserError(f"{place(node, where)}: the tag {shown(tag)} is not read; remove it")
    return node.value


def is_null(node: Node) -> bool:
    """Whether it says null: `null`, `~` or nothing at all, without quotes."""
    return isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def kind(node: Node) -> str:
    """What a node is called."""
    return "list" if isinstance(node, SequenceNode) else "mapping" if isinstance(node, MappingNode) else "word"


class _Dumper(yaml.SafeDumper):
    pass


def _represent_text(dumper: _Dumper, text: str) -> ScalarNode:
    # PyYAML takes some line separators for what they are not, unless they are escaped.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def dump(tree: dict[str, object]) -> str:
    """Dicts, lists and scalars as YAML, in which every text is read as it was."""
    return yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
