"""Names of optimizers. A file of this folder registers its rule with a decorator; a name can be taken once."""

import importlib
import pkgutil
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.optimizers.options import check_given

_RULES: dict[str, type] = {}


def register(cls: type) -> type:
    """Class decorator: makes the rule known under its `name`."""
    name = cls.name  # type: ignore[attr-defined]
    if name in _RULES:
        raise ValueError(f"optimizer {name!r} is registered twice, by {_RULES[name]} and {cls}")
    _RULES[name] = cls
    return cls


def rules() -> dict[str, type]:
    """All rules by name, importing their files once."""
    package = importlib.import_module("megatron_opt.optimizers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"megatron_opt.optimizers.{module.name}")
    return dict(_RULES)


def build(name: str, options: dict[str, Any]) -> Any:
    """An optimizer from its name and options; unknown names and options, and those without effect, are refused."""
    known = rules()
    if name not in known:
        raise UserError(f"there is no optimizer {name!r}; there are {', '.join(sorted(known))}.")
    cls = known[name]
    fields = set(cls.Config.__dataclass_fields__)  # type: ignore[attr-defined]
    if unknown := sorted(set(options) - fields):
        raise UserError(
            f"optimizer {name!r} has no option {unknown[0]!r}; it has {', '.join(sorted(fields)) or 'none'}."
        )
    config = cls.Config(**options)  # type: ignore[attr-defined]
    check_given(name, config, options)
    return cls(config)
