"""Strict YAML for the dataclasses of `config.py`: every mistake is one sentence with file, line and remedy.

The YAML is only composed into nodes, never constructed, so a file can name no Python type and run no code,
and every node still knows its line. Values are coerced by the annotated type of the field, so `1e-4` and `50`
are floats where a float is expected. Keys that a file leaves out keep the value of `base`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import math
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from uni3d.config.values import Schedule, suggestion
from uni3d.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 50
_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_NUMBER = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_PLAIN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*[A-Za-z0-9]")
_YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "null")
_VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}")
_TAG = "tag:yaml.org,2002:"

T = TypeVar("T")


def load_config(path: str | Path, base: T) -> T:
    """Read the YAML file `path` over the values of the dataclass instance `base` and return a new instance.

    Raises ConfigError for a file that cannot be read, is no YAML mapping, names an unknown or a repeated key,
    or holds a value of the wrong type or outside its range.
    """
    file = Path(path)
    root = _compose(_read_text(file), file)
    if root is None:
        return base
    return _Reader(file).read_dataclass(root, base, "")


def load_variants(path: str | Path, base: T, *, over: Mapping[str, T] | None = None) -> dict[str, T]:
    """Read a YAML file of named variants, each laid over the dataclass instance `base`, in the file's order.

    With `over`, each is laid over the instance of its own name there instead, which must exist.

    Raises ConfigError as `load_config`, for a name given twice, and for a file without variants.
    """
    file = Path(path)
    root = _compose(_read_text(file), file)
    reader = _Reader(file)
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise ConfigError(f"{file} names no variants; expected names with keys and values under each")
    variants: dict[str, T] = {}
    for name_node, node in root.value:
        name = name_node.value if isinstance(name_node, yaml.ScalarNode) else ""
        if not _VARIANT_NAME.fullmatch(name):
            reader.fail(
                name_node, f"a variant is called {_describe(name_node)}; use letters, digits, '-' and '.'"
            )
        if name in variants:
            reader.fail(name_node, f"variant '{name}' is given twice; keep one of them")
        if over is not None and name not in over:
            reader.fail(name_node, f"unknown variant '{name}'; {suggestion(name, list(over))}")
        variants[name] = reader.read_dataclass(node, base if over is None else over[name], f"{name}.")
    return variants


def config_to_yaml(config: Any) -> str:
    """The configuration as YAML, each key under its documentation; `load_config` reads an equal one back."""
    head = (type(config).__doc__ or "").strip().splitlines()[0]
    return f"# {head}\n\n" + "\n".join(_yaml_lines(config, "")) + "\n"


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts of JSON values: lists for tuples, text for paths."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def _read_text(file: Path) -> str:
    try:
        if not file.exists():
            raise ConfigError(f"configuration file '{file}' does not exist; check the path given to --config")
        if not file.is_file():
            raise ConfigError(f"configuration '{file}' is not a file; pass a YAML file")
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"configuration file '{file}' cannot be read: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(
            f"configuration file '{file}' is larger than {MAX_FILE_BYTES >> 20} MiB; "
            f"pass a settings file, not data"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"configuration file '{file}' is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error


def _compose(text: str, file: Path) -> yaml.Node | None:
    try:
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > MAX_DEPTH:
                line = token.start_mark.line + 1
                raise ConfigError(f"{file}:{line}: the values are nested too deeply for a settings file")
            if isinstance(token, (yaml.AnchorToken, yaml.AliasToken, yaml.TagToken)):
                raise ConfigError(
                    f"{file}:{token.start_mark.line + 1}: anchors, aliases and tags are not accepted; "
                    f"write the value itself"
                )
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = error.problem or error.context or "it cannot be parsed"
        if "'\\t'" in problem:
            problem = "a tab where only spaces may be; indent with spaces"
        raise ConfigError(f"{file}:{line}: not valid YAML: {problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error


@dataclasses.dataclass(frozen=True)
class _Reader:
    file: Path

    def fail(self, node: yaml.Node, message: str) -> NoReturn:
        raise ConfigError(f"{self.file}:{node.start_mark.line + 1}: {message}")

    def read_dataclass(self, node: yaml.Node, base: Any, prefix: str) -> Any:
        """Overlay the mapping `node` on the dataclass instance `base`; `prefix` is its dotted path."""
        if not isinstance(node, yaml.MappingNode):
            what = f"'{prefix.rstrip('.')}'" if prefix else "the file"
            self.fail(node, f"{what} holds {_describe(node)}; expected keys with values")
        hints = get_type_hints(type(base))
        known = [field.name for field in dataclasses.fields(base)]
        changes: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.fail(
                    key_node, f"a key under '{prefix or '.'}' is {_describe(key_node)}; expected a name"
                )
            key = key_node.value
            if key not in known:
                group, dot, inner = key.partition(".")
                remedy = (
                    f"write '{inner[:80]}' indented under '{group}:'"
                    if dot and group in known
                    else suggestion(key, known)
                )
                self.fail(key_node, f"unknown key '{prefix}{key[:80]}'; {remedy}")
            if key in changes:
                self.fail(key_node, f"key '{prefix}{key}' is given twice; keep one of them")
            current = getattr(base, key)
            if dataclasses.is_dataclass(current):
                changes[key] = self.read_dataclass(value_node, current, f"{prefix}{key}.")
            else:
                changes[key] = self.read_value(value_node, hints[key], f"{prefix}{key}")
        try:
            return dataclasses.replace(base, **changes)
        except ConfigError as error:
            if str(error).startswith(f"{self.file}:"):
                raise
            self.fail(node, str(error))

    def read_value(self, node: yaml.Node, kind: Any, key: str) -> Any:
        """Coerce `node` to the annotated type `kind`."""
        if kind == Schedule:
            return self.read_schedule(node, key)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin in (Union, types.UnionType):
            return self.read_optional(node, arguments, key)
        if origin is Literal:
            return self.read_choice(node, arguments, key)
        if origin is tuple:
            return self.read_tuple(node, arguments, key)
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, f"'{key}' is {_describe(node)}; expected {_NAMES[kind]}")
        if kind is bool:
            return self.read_bool(node, key)
        if kind is int:
            return self.read_int(node, key)
        if kind is float:
            return self.read_float(node, key)
        return kind(self.read_text(node, key))

    def read_optional(self, node: yaml.Node, arguments: tuple[Any, ...], key: str) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}null":
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return self.read_value(node, kind, key)

    def read_choice(self, node: yaml.Node, choices: tuple[Any, ...], key: str) -> Any:
        value = node.value if isinstance(node, yaml.ScalarNode) else None
        if value not in choices:
            shown = repr(value[:80]) if isinstance(value, str) else _describe(node)
            self.fail(node, f"'{key}' is {shown}; {suggestion(str(value), choices)}")
        return value

    def read_tuple(self, node: yaml.Node, arguments: tuple[Any, ...], key: str) -> tuple[Any, ...]:
        if not isinstance(node, yaml.SequenceNode):
            self.fail(node, f"'{key}' is {_describe(node)}; expected a list such as [a, b]")
        if arguments[-1] is Ellipsis:
            kinds = [arguments[0]] * len(node.value)
        else:
            kinds = list(arguments)
            if len(kinds) != len(node.value):
                self.fail(node, f"'{key}' has {len(node.value)} values; expected {len(kinds)}")
        return tuple(self.read_value(item, kind, key) for item, kind in zip(node.value, kinds, strict=True))

    def read_schedule(self, node: yaml.Node, key: str) -> Schedule:
        """A list of [fraction of the run, value] pairs; a bare number is a constant."""
        if isinstance(node, yaml.ScalarNode):
            return ((0.0, self.read_float(node, key)),)
        pairs: list[tuple[float, float]] = []
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(item, yaml.SequenceNode) or len(item.value) != 2:
                self.fail(item, f"'{key}' is {_describe(item)}; expected a number or pairs [[0, 12], [1, 6]]")
            position, value = (self.read_value(number, float, key) for number in item.value)
            pairs.append((position, value))
        return tuple(pairs)

    def read_bool(self, node: yaml.ScalarNode, key: str) -> bool:
        if node.style is None and node.value.lower() in ("true", "false"):
            return node.value.lower() == "true"
        self.fail(node, f"'{key}' is {_describe(node)}; expected true or false")

    def read_int(self, node: yaml.ScalarNode, key: str) -> int:
        if node.style is None and _INTEGER.fullmatch(node.value) and len(node.value) <= 40:
            return int(node.value)
        self.fail(node, f"'{key}' is {_describe(node)}; expected a whole number")

    def read_float(self, node: yaml.ScalarNode, key: str) -> float:
        if node.style is None and _NUMBER.fullmatch(node.value):
            value = float(node.value)
            if math.isfinite(value):
                return value
        self.fail(node, f"'{key}' is {_describe(node)}; expected a number")

    def read_text(self, node: yaml.ScalarNode, key: str) -> str:
        if node.style is None and node.tag in (f"{_TAG}null", f"{_TAG}bool"):
            self.fail(node, f"'{key}' is {_describe(node)}; expected text, so put it in quotes")
        return node.value


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def _describe(node: yaml.Node) -> str:
    """How an error names the value that was got."""
    if isinstance(node, yaml.MappingNode):
        return "a group of keys"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    if node.tag == f"{_TAG}null":
        return "empty"
    text = repr(str(node.value)[:80])
    is_quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    return f"the quoted text {text}" if is_quoted else text


def _yaml_lines(config: Any, indent: str) -> Iterator[str]:
    documentation = field_documentation(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_group = dataclasses.is_dataclass(value)
        text = (type(value).__doc__ or "").splitlines()[0] if is_group else documentation.get(field.name, "")
        if is_group and not indent:
            yield ""
        for line in textwrap.wrap(text, 98 - len(indent)):
            yield f"{indent}# {line}"
        if is_group:
            yield f"{indent}{field.name}:"
            yield from _yaml_lines(value, indent + "  ")
        else:
            yield f"{indent}{field.name}: {_yaml_value(_plain(value))}"


def _yaml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_yaml_value(item) for item in value)}]"
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 readers take 1e-05 for text; with a point it is a number to everyone.
        return text if "e" not in text or "." in text else text.replace("e", ".0e")
    is_plain = isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) and value.lower() not in _YAML_WORDS
    return value if is_plain else json.dumps(value, ensure_ascii=False)


@functools.cache
def field_documentation(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass, one line each; empty where the source is not at hand."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            found[statement.target.id] = " ".join(str(following.value.value).split())
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
