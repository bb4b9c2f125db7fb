"""Reads and validates `phases:` of a study file."""

from __future__ import annotations

from megatron_opt.errors import UserError
from megatron_opt.study.models import Model
from megatron_opt.study.spec import PARAMETRIZATIONS, PHASES, Phase, Regime
from megatron_opt.study.yaml_lines import Reader
from megatron_opt.yaml_files import LocatedList


def read_phases(
    top: Reader,
    models: dict[str, Model],
    optimizers: tuple[str, ...],
    ratios: tuple[float, ...],
    epochs: tuple[int, ...],
    several_seeds: bool,
) -> tuple[Phase, ...]:
    """The search uses the first seed; further seeds repeat its winners in a last phase, unless transfers do that already."""
    everywhere = tuple(Regime(model, ratio, one) for model in models for ratio in ratios for one in epochs)
    raw = top.items("phases", ["grid"])
    lines = raw.lines if isinstance(raw, LocatedList) else [top.line_of("phases")] * len(raw)
    listed: list[tuple[str, tuple[Regime, ...] | None, tuple[str, ...], bool, int]] = []
    proxies: dict[int, tuple[Regime, tuple[str, ...], bool]] = {}
    for item, line in zip(raw, lines):
        if isinstance(item, str):
            listed.append((item, None, (), False, line))
        else:
            reader = Reader(item, top.path, "a phase", line)
            regimes, names = _regimes(reader, models), tuple(map(str, reader.items("optimizers") or ()))
            unknown = [name for name in names if name not in optimizers]
            if unknown:
                raise reader.error(f"no optimizer {unknown[0]!r}; there are {', '.join(optimizers)}", "optimizers")
            kind = reader.text("kind", required=True)
            listed.append((kind, regimes, names, reader.flag("registered", False), line))
            if kind == "transfer":
                proxies[line] = _transfer(reader, models, regimes)
            reader.finish()
    later = {r for kind, regimes, *_ in listed for r in regimes or () if kind in ("restricted", "predict", "transfer")}
    phases: list[Phase] = []
    for kind, regimes, names, registered, line in listed:
        _check_phase(top, kind, regimes, phases, line)
        searched = {
            name for phase in phases if phase.kind in ("grid", "descent") for name in phase.optimizers or optimizers
        }
        untuned = set(names or optimizers) - searched
        if kind in ("restricted", "predict") and untuned:
            raise UserError(
                f"{top.path}:{line}: phase {kind!r} takes {', '.join(sorted(untuned))} from an earlier search, which leaves it "
                "out; name it there too, or list the others under `optimizers:`"
            )
        if registered and kind != "predict":
            raise UserError(f"{top.path}:{line}: `registered: true` is for a phase of kind predict, not {kind!r}")
        if registered and any(regime.epochs > 1 for regime in regimes or ()):
            raise UserError(
                f"{top.path}:{line}: `registered: true` is for unique tokens; no law here predicts repeated ones"
            )
        if regimes is None:
            regimes = everywhere if kind == "seeds" else tuple(r for r in everywhere if r not in later)
        phases.append(Phase(kind, regimes, names, registered, *proxies.get(line, ())))
    if several_seeds and not {"seeds", "transfer"} & {phase.kind for phase in phases}:
        phases.append(Phase("seeds", everywhere))
    return tuple(phases)


def _transfer(
    reader: Reader, models: dict[str, Model], regimes: tuple[Regime, ...] | None
) -> tuple[Regime, tuple[str, ...], bool]:
    """The proxy and the parametrizations of a transfer phase, and whether rates are swept where it carries them."""
    where = _regimes(reader, models, "proxy", required=True)
    kinds = tuple(map(str, reader.items("parametrizations", list(PARAMETRIZATIONS))))
    unknown = [kind for kind in kinds if kind not in PARAMETRIZATIONS]
    if unknown or len(set(kinds)) < len(kinds):
        raise reader.error(
            f"`parametrizations:` must be different ones of {', '.join(PARAMETRIZATIONS)}, not {', '.join(kinds)}",
            "parametrizations",
        )
    if where is None or len(where) > 1:
        raise reader.error("`proxy:` is one regime, such as small@1x", "proxy")
    for regime in regimes or ():
        if models[regime.model].shape["hidden_size"] <= models[where[0].model].shape["hidden_size"]:
            raise reader.error(f"{regime} is no wider than the proxy {where[0]}; list wider models", "regimes")
    return where[0], kinds, reader.flag("sweep", True)


def _check_phase(top: Reader, kind: str, regimes: tuple[Regime, ...] | None, phases: list[Phase], line: int) -> None:
    before = [phase.kind for phase in phases]
    where = f"{top.path}:{line}:"
    if kind not in PHASES:
        raise UserError(f"{where} no phase {kind!r}; there are {', '.join(PHASES)}")
    if kind in before and kind not in (
        "predict",
        "seeds",
        "transfer",
    ):  # what waits for a prediction comes after what does not
        raise UserError(f"{where} phase {kind!r} is listed twice; give it all its regimes at once")
    if kind in ("restricted", "predict", "transfer") and regimes is None:
        raise UserError(f"{where} phase {kind!r} needs `regimes:`, such as [large@1x]")
    if kind == "restricted" and "descent" not in before:
        raise UserError(f"{where} phase 'restricted' needs a 'descent' before it, which finds what is sensitive")
    if kind in ("predict", "seeds") and not {"grid", "descent"} & set(before):
        raise UserError(f"{where} phase {kind!r} needs a 'grid' or 'descent' before it")


def _regimes(
    reader: Reader, models: dict[str, Model], key: str = "regimes", required: bool = False
) -> tuple[Regime, ...] | None:
    listed = reader.items(key, required=required)
    if listed is None:
        return None
    regimes = []
    for text in listed:
        try:
            regime = Regime.parse(str(text))
        except UserError as error:
            raise reader.error(str(error), key) from None
        if regime.model not in models:
            raise reader.error(f"regime {text!r} names no model of `models:` ({', '.join(models)})", key)
        regimes.append(regime)
    return tuple(regimes)
