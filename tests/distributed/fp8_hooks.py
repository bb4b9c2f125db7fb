"""What FP8 cases look at inside their ranks: quantizers beside references that share no code with them."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.distributed import recording
from tests.distributed.cases import Case

LIMITS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}  # mantissa bits, lowest exponent, largest
TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """fp64 numbers to the nearest of a format, ties to even, saturated: by the formats' definition."""
    bits, lowest, largest = LIMITS[kind]
    exponent = np.maximum(np.frexp(values)[1] - 1, lowest)
    unit = np.ldexp(1.0, exponent - bits)
    return np.clip(np.rint(values / unit) * unit, -largest, largest)


def blockwise_reference(x: np.ndarray, kind: str, largest_input: float) -> tuple[np.ndarray, float]:
    """(numbers, 1/scale) of one tile: Transformer Engine's tests/pytorch/references/blockwise_quantizer_reference.py."""
    amax, largest = np.float32(np.abs(x).max()), LIMITS[kind][2]
    if amax == 0:
        return np.zeros_like(x), 1.0
    quotient = float(np.float32(largest) / amax) if largest / float(amax) < 2.0**128 else largest_input
    scale = 2.0 ** math.floor(math.log2(quotient))
    return rounded(x.astype(np.float64) * scale, kind), 1 / scale


def mx_reference(runs: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, scales) of runs of 32 (…, 32): OCP's MX format, the scale amax/largest rounded up to a power of two."""
    quotient = (np.abs(runs).max(-1).astype(np.float32) * np.float32(1.0 / LIMITS[kind][2])).astype(np.float64)
    mantissa, exponent = np.frexp(quotient)  # mantissa × 2^exponent, from 1/2 to 1
    up = np.where(quotient > 0, np.maximum(exponent - (mantissa == 0.5), -127), -127)
    return rounded(runs.astype(np.float64) * np.ldexp(1.0, -up)[..., None], kind), np.ldexp(1.0, up)


def _runs_that_differ(tensor: Any, x: np.ndarray, kind: str) -> int:
    """Numbers and scales of an MXFP8 tensor that are not the reference's, of rows and of columns."""
    faults = 0
    for usage, values in (("rowwise", x), ("columnwise", x.T)):
        numbers, inverse = _numbers(getattr(tensor, f"_{usage}_data"), kind), getattr(tensor, f"_{usage}_scale_inv")
        found, scales = (numbers, inverse) if usage == "rowwise" else (numbers.T, inverse.t())
        wanted, scale = mx_reference(values.reshape(len(values), -1, 32), kind)
        faults += int((found.reshape(wanted.shape) != wanted).sum())
        here = scales[: scale.shape[0], : scale.shape[1]].double().numpy()  # padded
        faults += int((2.0 ** (here - 127) != scale).sum())
    return faults


def spread(rows: int, cols: int) -> Tensor:
    """bf16 numbers over the whole range, in tiles of very different size: one of zeros, a huge one and a tiny one among them."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, cols, generator=generator) * torch.exp(3 * torch.randn(rows, cols, generator=generator))
    x *= (
        torch.exp2(torch.randint(-40, 40, (-(-rows // 32), -(-cols // 32)), generator=generator).float())
        .repeat_interleave(32, 0)
        .repeat_interleave(32, 1)[:rows, :cols]
    )
    x[:32, :32] = 0
    x[32:64, :128] *= 1e25
    x[:, -32:] *= 1e-30
    return x.clamp(-3e38, 3e38).bfloat16()


def _tiles(x: np.ndarray, rows: int, cols: int) -> Any:
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], cols):
            yield i // rows, j // cols, slice(i, i + rows), slice(j, j + cols)


def _numbers(data: Tensor, kind: str) -> np.ndarray:
    return data.view(TYPES[kind]).double().numpy()


def _blockwise_faults(x: Tensor, kind: str, square: bool, te: Any) -> int:
    """Numbers and scales of a blockwise tensor that are not the reference's, of rows and columns."""
    number = {"e4m3": 7, "e5m2": 8}[kind]
    quantizer = te.Float8BlockQuantizer(number, rowwise=True, columnwise=True, block_scaling_dim=2 if square else 1)
    found, faults = quantizer(x), 0
    for usage, values in (("rowwise", x), ("columnwise", x.t())):
        numbers = _numbers(getattr(found, f"_{usage}_data"), kind)
        inverse = getattr(found, f"_{usage}_scale_inv")
        for i, j, r, c in _tiles(values.float().numpy(), 128 if square else 1, 128):
            wanted, scale = blockwise_reference(values.float().numpy()[r, c], kind, torch.finfo(torch.bfloat16).max)
            faults += int((numbers[r, c] != wanted).sum()) + (float(inverse[(i, j) if square else (j, i)]) != scale)
    return faults


def _mx_faults(x: Tensor, kind: str, te: Any) -> int:
    return _runs_that_differ(te.MXFP8Quantizer({"e4m3": 7, "e5m2": 8}[kind])(x), x.float().numpy(), kind)


def _tensorwise_faults(x: Tensor, kind: str, te: Any) -> int:
    """Against the reference in Transformer Engine's own package."""
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

    found = te.Float8CurrentScalingQuantizer({"e4m3": 7, "e5m2": 8}[kind], device=torch.device("cpu"))(x)
    wanted = CurrentScalingQuantizerRef(TYPES[kind]).quantize(x)
    same = [
        torch.equal(found._data, wanted.data.view(torch.uint8)),
        torch.equal(found._transpose, wanted.data_t.view(torch.uint8)),
        float(found._scale_inv) == float(wanted.scale),
    ]
    return same.count(False)


def _product_error() -> float:
    """The largest relative error of a product of MXFP8 matrices, against exact sums of their numbers in fp64."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    generator = torch.Generator().manual_seed(3)
    w, x = (torch.randn(n, 96, generator=generator).bfloat16() for n in (64, 32))
    qw, qx = te.MXFP8Quantizer(7)(w), te.MXFP8Quantizer(7)(x)
    actual = general_gemm(qw, qx, out_dtype=torch.float32)[0].double()

    def exact(matrix: Tensor) -> Tensor:
        numbers, scales = mx_reference(matrix.float().numpy().reshape(len(matrix), -1, 32), "e4m3")
        return torch.from_numpy((numbers * scales[..., None]).reshape(matrix.shape))

    wanted = exact(x) @ exact(w).t()
    return float(((actual - wanted).abs() / wanted.abs()).max())


def quantizers(case: Case, record: recording.Record, argv: list[str], folder: Any) -> None:
    """Record faults of every quantizer by recipe and format."""

    def compare(record: recording.Record) -> None:
        import transformer_engine.pytorch as te

        x, found = spread(160, 192), {}
        for kind in LIMITS:
            found[f"blockwise 1×128 {kind}"] = _blockwise_faults(spread(130, 288), kind, False, te)
            found[f"blockwise 128×128 {kind}"] = _blockwise_faults(spread(130, 288), kind, True, te)
            found[f"mxfp8 {kind}"] = _mx_faults(x, kind, te)
            found[f"tensorwise {kind}"] = _tensorwise_faults(x, kind, te)
        record.extra["faults"] = found
        record.extra["product_error"] = _product_error()

    record.at_end.append(compare)


def ranges(case: Case, record: recording.Record, argv: list[str], folder: Any) -> None:
    """Record what every report of `--log-fp8-ranges` says, and where its counts of small tensors are not direct ones."""
    from megatron_opt.training import fp8_ranges

    report = fp8_ranges.Ranges.report
    record.extra["ranges"] = []

    def reporting(self: Any) -> Any:
        found = report(self)
        record.extra["ranges"].append(found and found.entry)
        return found

    fp8_ranges.Ranges.report = reporting  # type: ignore[method-assign]
    record.at_end.append(lambda record: record.extra.update(range_faults=_range_faults()))


def _range_faults() -> list[str]:
    """Recipes and formats whose (underflows, overflows) are not those of the formats' definition."""
    import transformer_engine.pytorch as te

    from megatron_opt.training.fp8_ranges import losses

    generator = torch.Generator().manual_seed(7)
    x = (torch.randn(64, 96, generator=generator) * torch.exp(6 * torch.randn(64, 96, generator=generator))).bfloat16()
    x[0, :5], wrong = 0, []
    values = x.double().numpy()
    for kind, number in (("e4m3", 7), ("e5m2", 8)):
        scaled, largest = values * 16, LIMITS[kind][2]
        wanted = {"one scale": (_to_zero(values, rounded(scaled, kind)), int((np.abs(scaled) > largest).sum()))}
        found = {"one scale": te.Float8Quantizer(torch.full((1,), 16.0), torch.zeros(1), number)(x)}
        mx = np.zeros_like(values)
        for _, _, r, c in _tiles(values, 1, 32):
            mx[r, c] = mx_reference(values[r, c], kind)[0]
        wanted["mxfp8"], found["mxfp8"] = (_to_zero(values, mx), 0), te.MXFP8Quantizer(number)(x)
        for name, counts in wanted.items():
            ours = tuple(int(one) for one in losses(x, found[name]) or ())
            if ours != counts or not counts[0] or (name == "one scale" and kind == "e4m3" and not counts[1]):
                wrong.append(f"{name} {kind}: {ours}, not {counts}")
    return wrong


def _to_zero(values: np.ndarray, numbers: np.ndarray) -> int:
    return int(((values != 0) & (numbers == 0)).sum())


_TENSORS = (
    *("_data", "_transpose", "_scale_inv"),
    *(f"_{usage}_{what}" for usage in ("rowwise", "columnwise") for what in ("data", "scale_inv")),
)


def held_bytes(case: Case, record: recording.Record, argv: list[str], folder: Any) -> None:
    """Record the bytes of the model's parameters, [plain, quantized or cast], as they lie after the last step."""

    def count(record: recording.Record) -> None:
        from megatron.core.fp8_utils import is_float8tensor

        plain = quantized = 0
        for chunk in record.optimizer.model_chunks:
            for param in chunk.parameters():
                if is_float8tensor(param):
                    quantized += _bytes(param)
                else:
                    plain += param.numel() * param.element_size()
            for module in chunk.modules():
                quantized += sum(_bytes(cast) for cast in getattr(module, "_fp8_workspaces", {}).values())
        record.extra["held_bytes"] = [plain, quantized]

    record.at_end.append(count)


def _bytes(tensor: Any) -> int:
    parts = [getattr(tensor, name, None) for name in _TENSORS]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def weights(case: Case, record: recording.Record, argv: list[str], folder: Any) -> Any:
    """As `checkpoint` and `held_bytes`; record after every step, and after a load, how many FP8 parameters there are, and how many
    of their numbers are not the reference's of the gathered main copies, rounded to bf16.
    """
    from megatron.training import training

    from tests.distributed import hooks

    held_bytes(case, record, argv, folder)
    faults = record.extra["fp8_weights"] = []

    def look(record: recording.Record) -> None:
        faults.append(_weight_faults(record.optimizer))

    train = training.train

    def training_with(*args: Any, **kwargs: Any) -> Any:
        look(record)
        return train(*args, **kwargs)

    training.train = training_with
    record.after_step.append(look)
    return hooks.checkpoint(case, record, argv, folder) if case.options else None


def _weight_faults(optimizer: Any) -> tuple[int, int]:
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from megatron.core.fp8_utils import is_float8tensor

    rank = ps.get_tensor_model_parallel_rank()
    mine = [
        (f.view.name, rank, f.start, f.main.clone()) for f in optimizer.param_shards() if is_float8tensor(f.view.param)
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = [part for theirs in everyone for part in theirs]
    params = {
        v.name: v.param
        for d in optimizer.shard_groups
        for v in (f.view for f in d.param_shards)
        if is_float8tensor(v.param)
    }
    faults = 0
    for name, param in params.items():
        main = torch.zeros(param.numel())
        for _, at, start, part in (part for part in found if part[0] == name):
            if at == rank:
                main[start : start + part.numel()] = part
        amax = max(float(part.bfloat16().abs().max()) for other, _, _, part in found if other == name)
        faults += _faults(param, main.bfloat16().float().view(param.shape).numpy(), amax)
    return len(params), faults


def _faults(param: Any, main: np.ndarray, amax: float) -> int:
    """Numbers of a parameter that are not the reference's, of rows and of columns; `amax` of the whole matrix."""
    kind = type(param).__name__ if type(param).__name__ != "Parameter" else type(param.data).__name__
    if kind == "Float8Tensor":
        delayed = type(param._get_quantizer()).__name__ == "Float8Quantizer"  # a scale of earlier steps
        scale = np.float32(param._get_quantizer().scale if delayed else np.float32(448.0) / np.float32(amax))
        wanted = rounded((main * scale).astype(np.float64), "e4m3")
        rows, columns = _numbers(param._data, "e4m3"), _numbers(param._transpose, "e4m3").T
        return int((rows != wanted).sum() + (columns != wanted).sum())
    faults = 0
    if kind == "Float8BlockwiseQTensor":
        rows, columns = _numbers(param._rowwise_data, "e4m3"), _numbers(param._columnwise_data, "e4m3").T
        for i, j, r, c in _tiles(main, 128, 128):
            wanted, scale = blockwise_reference(main[r, c], "e4m3", torch.finfo(torch.bfloat16).max)
            faults += int((rows[r, c] != wanted).sum() + (columns[r, c] != wanted).sum())
            faults += (float(param._rowwise_scale_inv[i, j]) != scale) + (
                float(param._columnwise_scale_inv[j, i]) != scale
            )
        return faults
    assert kind == "MXFP8Tensor", kind
    return _runs_that_differ(param, main, "e4m3")
