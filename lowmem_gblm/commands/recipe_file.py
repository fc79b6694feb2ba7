"""The file of a recipe: YAML, or a record of a run that has one."""

from pathlib import Path
from typing import Any

import yaml

from lowmem_gblm.errors import RequestError, shown

_MAX_YAML_BYTES = 1 << 16
_LONGEST_REASON = 400
_QUOTES = '. Globs need quotes in YAML, as "*.mlp.*": 0.6'


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Return keys and values of a recipe; raise `RequestError` if the file holds none."""
    from lowmem_gblm.storage.checkpoint.strict_json import MAX_JSON_BYTES, strict_json

    is_json = path.suffix == ".json"
    most = MAX_JSON_BYTES if is_json else _MAX_YAML_BYTES
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise RequestError(f"the recipe {path} cannot be read: {error.strerror}") from None
    if len(content) > most:
        raise RequestError(f"{path} has more than {most} bytes, which is too long for a recipe")
    try:
        found = strict_json(content) if is_json else _from_yaml(content)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = shown(" ".join(str(error).split()), _LONGEST_REASON)
        hint = _QUOTES if isinstance(error, yaml.YAMLError) else ""
        raise RequestError(f"the recipe {path} cannot be read: {reason}{hint}") from None
    if isinstance(found, dict) and "tensors" in found:
        if "recipe" not in found:
            raise RequestError(f"{path} is the record of a version of lowmem-gblm without recipes")
        found = found["recipe"]
    if not isinstance(found, dict):
        raise RequestError(f"the recipe {path} must hold options, as sparsity: 0.5")
    return found


def _from_yaml(content: bytes) -> Any:
    """Return what a YAML text holds; every single value is the text that was typed.

    YAML itself would take 2:4 for the number 124, and the last of two equal keys.
    """
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, yaml.BaseLoader)):
        raise yaml.YAMLError("it has an alias")
    root = yaml.compose(content, yaml.BaseLoader)
    return None if root is None else _plain(root)


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(one) for one in node.value]
    if not isinstance(node, yaml.MappingNode):
        return node.value
    names = [str(key.value) for key, _ in node.value]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"it has the key {shown(twice[0])} twice")
    return {name: _plain(value) for name, (_, value) in zip(names, node.value, strict=True)}
