"""This rank's device has one name, `kernels.host.current_device`: where CUDA is pretended, nothing asks CUDA past it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_opt"
FOLDERS = ("checkpointing", "distributed", "optimizers", "training")


def _asks_cuda(call: ast.Call) -> bool:
    names_cuda = [one for one in (*call.args, *(k.value for k in call.keywords if k.arg == "device"))]
    literal = any(isinstance(one, ast.Constant) and one.value == "cuda" for one in names_cuda)
    function = ast.unparse(call.func)
    return function.endswith("cuda.current_device") or (literal and function.startswith("torch."))


def test_nothing_asks_cuda_for_the_device() -> None:
    files = [path for folder in FOLDERS for path in sorted((PACKAGE / folder).glob("**/*.py"))]
    assert len(files) > 50
    asks = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _asks_cuda(node)
    ]
    assert not asks
