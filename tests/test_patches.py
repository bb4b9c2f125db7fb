"""The table of patches is whole, its targets are what they were, and the docs show it. Reads sources, imports no Megatron."""

import ast
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

from megatron_opt import patches

ROOT = Path(patches.__file__).parent
DIGESTS = Path(__file__).parent / "patch_digests.json"
BY_NAME = ("setattr(torch.distributed, name", "setattr(cuda, name", "setattr(torch, name")  # entries that end in .*


def _file(module: str) -> Path | None:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    base = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _definition(module: str, names: list[str]) -> str | None:
    """Source of what `module.names` is defined as, through imports."""
    path = _file(module)
    if path is None:
        return None
    text = path.read_text()
    body: list[ast.stmt] = ast.parse(text).body
    owner: ast.AST | None = None
    for depth, name in enumerate(names):
        found = None
        for node in (inner for statement in body for inner in _here(statement)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                found = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found = node if any(isinstance(t, ast.Name) and t.id == name for t in targets) else found
            elif isinstance(node, ast.ImportFrom) and found is None:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                        for _ in range(node.level - 1):
                            package = package.rpartition(".")[0]
                        source = f"{package}.{node.module}" if node.level else node.module
                        return _definition(str(source).rstrip("."), [alias.name, *names[depth + 1 :]])
        if found is None:  # inherited
            bases = [base.id for base in getattr(owner, "bases", []) if isinstance(base, ast.Name)]
            return next((text for base in bases if (text := _definition(module, [base, *names[depth:]]))), None)
        if depth == len(names) - 1:
            return ast.unparse(found)
        owner, body = found, getattr(found, "body", [])
    return None


def _here(statement: ast.stmt) -> list[ast.stmt]:
    """A statement, and those below its if, try and with, which define names at the same level."""
    found = [statement]
    if isinstance(statement, (ast.If, ast.Try, ast.With)):
        handlers = [s for handler in getattr(statement, "handlers", []) for s in handler.body]
        for inner in [
            *statement.body,
            *getattr(statement, "orelse", []),
            *handlers,
            *getattr(statement, "finalbody", []),
        ]:
            found += _here(inner)
    return found


def _source(target: str) -> str | None:
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if _file(".".join(parts[:cut])):
            return _definition(".".join(parts[:cut]), parts[cut:])
    return None


def _digest(target: str) -> str | None:
    text = _source(target)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else None


# but for a name of our own, which marks that a patch is in
MEGATRONS = sorted(
    {p.target for p in patches.PATCHES if p.target.startswith("megatron.")} - {"megatron.core.optimizer._megatron_opt"}
)


def test_every_target_is_what_it_was_when_it_was_looked_at() -> None:
    known = json.loads(DIGESTS.read_text())
    found = {target: _digest(target) for target in MEGATRONS}
    assert [target for target, digest in found.items() if digest is None] == [], "not there any more"
    changed = [target for target, digest in found.items() if known.get(target) != digest]
    assert changed == [], f"changed since megatron-core {known['version']}: read them, then write their digests anew"
    assert sorted(known) == sorted([*found, "version"])


def _replaced(path: Path) -> set[str]:
    """What a file of the package assigns to in Megatron and torch, directly or by `wrap`."""
    tree = ast.parse(path.read_text())
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def dotted(expression: ast.expr) -> str | None:
        if isinstance(expression, ast.Name):
            # a module that is handed over goes by its own name
            return {"training": "megatron.training.training"}.get(expression.id, names.get(expression.id))
        if isinstance(expression, ast.Attribute):
            base = dotted(expression.value)
            return f"{base}.{expression.attr}" if base else None
        return None

    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            stores = (
                e for t in targets for e in ast.walk(t) if isinstance(e, ast.Attribute) and isinstance(e.ctx, ast.Store)
            )
            found |= {name for store in stores if (name := dotted(store))}
    return {name for name in found if name.startswith(("megatron.", "torch."))}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_replacement_is_in_the_table(path: Path) -> None:
    listed = {patch.target for patch in patches.PATCHES if patch.file == str(path.relative_to(ROOT))}
    assert sorted(_replaced(path) - listed) == []


def test_every_entry_is_applied_by_its_file() -> None:
    missing = []
    for patch in patches.PATCHES:
        text = (ROOT / patch.file).read_text()
        name = patch.target.rpartition(".")[2]
        if name != "*" and name not in text:
            missing.append(patch)
        if name == "*" and not any(form in text for form in BY_NAME):
            missing.append(patch)
    assert missing == []


def test_wrappers_are_applied_in_the_tables_order(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (patches.Patch("json.dumps", "first.py", ""), patches.Patch("json.dumps", "second.py", ""))
    monkeypatch.setattr(patches, "PATCHES", table)
    monkeypatch.setattr(patches, "_applied", {})
    monkeypatch.setattr(json, "dumps", json.dumps)
    patches.wrap("json.dumps", "second.py", lambda original: lambda value: f"<{original(value)}>")
    assert json.dumps(1) == "<1>"
    with pytest.raises(RuntimeError, match=r"first\.py replaces json\.dumps after second\.py"):
        patches.wrap("json.dumps", "first.py", lambda original: original)
    with pytest.raises(RuntimeError, match="does not list"):
        patches.wrap("json.loads", "first.py", lambda original: original)


def test_the_docs_show_the_table() -> None:
    docs = (ROOT.parent / "docs" / "architecture.md").read_text()
    assert patches.table() in docs, "write the output of `python -m megatron_opt.patches` into docs/architecture.md"
