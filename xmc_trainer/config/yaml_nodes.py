"""Read and write YAML without type guessing: scalars keep their source text, and no object is constructed.

YAML infers a scalar's type from its spelling: `2026_1_11` is a number, `on` a boolean, `12:30:00` a base-60 number.
Here the caller decides instead. Errors name the file and the line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from xmc_trainer.errors import UserError, shown

_MAX_BYTES = 1 << 18
_MAX_DEPTH = 20
# Tags that YAML infers for untagged scalars. Any other was written explicitly, such as !!binary or !!python/object.
_INFERRED_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
}


class _Loader(yaml.SafeLoader):
    """Rejects deep nesting, which would overflow Python's stack.

    An alias shares its anchor's node, so nested aliases need no extra memory.
    """

    depth = 0

    def compose_node(self, parent: Node | None, index: object) -> Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_file(path: Path, what: str) -> Node | None:
    """Parse a YAML file; return None if it is empty.

    Args: what: the expected content, for error messages.
    Raises UserError if the file cannot be read or parsed.
    """
    content, problem = b"", "is not a file"
    try:
        if path.is_file() or not path.exists():  # reading a pipe could block forever
            with path.open("rb") as file:
                content, problem = file.read(_MAX_BYTES + 1), ""
    except OSError as error:
        problem = str(error.strerror)
    except ValueError:
        problem = "is not a valid file name"
    if problem:
        raise UserError(f"{path}: {problem}; name a YAML file of {what}")
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path}: is larger than {_MAX_BYTES >> 10} KiB; name a YAML file of {what}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8; convert the file") from None
    return parse(text, str(path))


def parse(text: str, where: str) -> Node | None:
    """Parse the single document in `text`; return None if it is empty. Raises UserError with `where` and the line."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = " ".join(part for part in (error.context, error.problem) if part)
    except yaml.reader.ReaderError as error:
        line = f", line {text[: error.position].count(chr(10)) + 1}"
        problem = f"contains the character U+{ord(text[error.position]):04X}, which YAML does not allow"
    except (ValueError, OverflowError) as error:  # for example an escape beyond the last code point
        line, problem = "", str(error)
    raise UserError(f"{where}{line}: not valid YAML: {problem}; correct it")


def location(node: Node, where: str) -> str:
    """Return "FILE, line N" of a node, for error messages."""
    return f"{where}, line {node.start_mark.line + 1}"


def entries(node: Node, where: str) -> Iterator[tuple[str, Node]]:
    """Yield (key, value) of a mapping. Raises UserError for a key that occurs twice or is not a scalar."""
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        key = scalar(key_node, where)
        if key in seen:
            raise UserError(
                f"{location(key_node, where)}: {shown(key)} occurs twice, first in line {seen[key]}; remove one"
            )
        seen[key] = key_node.start_mark.line + 1
        yield key, value


def scalar(node: Node, where: str) -> str:
    """Return the source text of a scalar, without quotes. Raises UserError for other nodes and explicit tags."""
    if not isinstance(node, ScalarNode):
        raise UserError(
            f"{location(node, where)}: a {kind(node)} where a single value is needed; quote it if it is text"
        )
    if node.tag not in _INFERRED_TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise UserError(f"{location(node, where)}: the tag {shown(tag)} is not supported; remove it")
    return node.value


def is_null(node: Node) -> bool:
    """Return whether a node is null: an unquoted `null`, `~` or nothing."""
    return isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def kind(node: Node) -> str:
    """Return the kind of a node, for error messages."""
    return "list" if isinstance(node, SequenceNode) else "mapping" if isinstance(node, MappingNode) else "single value"


class _Dumper(yaml.SafeDumper):
    pass


def _represent_text(dumper: _Dumper, text: str) -> ScalarNode:
    # PyYAML misreads some line separators unless they are escaped.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def dump(tree: dict[str, object]) -> str:
    """Write dicts, lists and scalars as YAML that reads back as the same texts."""
    return yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
