"""What files of ours use of vLLM, found in their source: what they import, override, and read of its classes."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

Use = tuple[str, str]
"""Module and name, which is `Class.member` for a member; where it is defined."""


def uses(file: Path) -> set[Use]:
    """Of a file of ours.

    Members are found where their class is written down: of a class of ours with a base of vLLM's what it overrides and
    reads of `self`, and what is read of an argument that is annotated with vLLM's class, or of the class itself.
    """
    tree = ast.parse(file.read_text())
    known = {name: _home(*use) for name, use in _imports(tree, "") if use[0].split(".")[0] == "vllm"}
    found = set(known.values())
    for node in ast.walk(tree):
        read: list[tuple[str, str]] = []  # class and member
        if isinstance(node, ast.FunctionDef):
            kinds = {
                argument.arg: argument.annotation.id
                for argument in node.args.args
                if isinstance(argument.annotation, ast.Name)
            }
            read += [(kinds[name], member) for name, member in _attributes(node) if name in kinds]
        elif isinstance(node, ast.ClassDef):
            own = [member.name for member in node.body if isinstance(member, ast.FunctionDef)]
            own += [member for name, member in _attributes(node) if name == "self"]
            read += [(base.id, member) for base in node.bases if isinstance(base, ast.Name) for member in own]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            read.append((node.value.id, node.attr))
        for name, member in read:
            found |= _member(known[name], member) if name in known else set()
    return found


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[str, Use]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            up = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            for alias in node.names:
                yield alias.asname or alias.name, (up + (node.module or ""), alias.name)


def _attributes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Name and attribute of each `name.attribute`."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
            yield inner.value.id, inner.attr


@cache
def _home(module: str, name: str) -> Use:
    """Where a name of vLLM's is defined, which its package may only pass on."""
    if not module.startswith("vllm"):
        return module, name
    source = _source(module)
    if name in source.defined:
        return module, name
    passed = [use for own, use in source.imported if own == name]
    starred = [(other, name) for own, (other, _) in source.imported if own == "*"]
    homes = [_home(*use) for use in passed + starred if use[0].startswith("vllm")]
    return next((home for home in homes if home[1] in _source(home[0]).defined), (module, name))


def _member(owner: Use, member: str) -> set[Use]:
    """Where the class, or one of its bases in vLLM, has a member; nothing if none has."""
    module, name = owner
    if not module.startswith("vllm") or name not in _source(module).classes:
        return set()
    members, bases = _source(module).classes[name]
    if member in members:
        return {(module, f"{name}.{member}")}
    return next((found for base in bases if (found := _member(_home(module, base), member))), set())


class _Source:
    """Of a module of vLLM's.

    Attributes:
        imported: own name, and module and name there.
        classes: members and bases by name.
        defined: names that it defines itself.
    """

    def __init__(self, module: str) -> None:
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text())
        package = module if spec.submodule_search_locations else module.rpartition(".")[0]
        self.imported = list(_imports(tree, package))
        self.classes = {
            node.name: (_members(node), [base.id for base in node.bases if isinstance(base, ast.Name)])
            for node in tree.body
            if isinstance(node, ast.ClassDef)
        }
        self.defined = _members(tree) | set(self.classes)


@cache
def _source(module: str) -> _Source:
    return _Source(module)


def _members(node: ast.ClassDef | ast.Module) -> set[str]:
    """Functions and attributes that a class or module defines."""
    found: set[str] = set()
    for member in node.body:
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(member.name)
            for inner in ast.walk(member):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    found |= (
                        {inner.attr}
                        if isinstance(inner.value, ast.Name) and inner.value.id == "self"
                        else set()
                    )
        targets = member.targets if isinstance(member, ast.Assign) else [getattr(member, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found
