"""Pytrees by path name, "layers/attention/q/kernel". For sharding, optimisers, checkpoints."""

import re
from collections.abc import Callable
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """The "/"-joined name of a key path as `jax.tree_util` gives it."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map`, with the path name of each leaf as first argument of `fn`."""
    return jax.tree_util.tree_map_with_path(lambda p, *leaf: fn(path_name(p), *leaf), tree, *rest)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Path name -> leaf, in the order of the flattened tree."""
    return {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def matches(pattern: str, name: str) -> bool:
    """Whether the regular expression `pattern` is found in a path name."""
    return re.search(pattern, name) is not None


def num_elements(tree: Any) -> int:
    """How many numbers the leaves hold; works on arrays and on `jax.ShapeDtypeStruct`."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
