"""`torchrun … -m megatron_opt.pretrain FLAGS`: Megatron-LM's pretrain() with this project's optimizers."""

import re
import sys
import traceback
from collections.abc import Sequence

from megatron_opt import quiet
from megatron_opt.errors import UserError, full, naming
from megatron_opt.extras import sentence_of
from megatron_opt.training import entry, failing, signals

_PEER_GONE = re.compile(r"Connection (closed|reset) by peer|Connection refused.*gloo|gloo.*Connection", re.S)


def run(argv: Sequence[str]) -> None:
    """Train as the flags say; bad input raises UserError before anything is written."""
    signals.die_with_launcher()
    quiet.install()
    entry.set_single_process_env()
    failing.listen()
    from megatron_opt import platform
    from megatron_opt.platform import transformer_engine

    platform.activate(transformer_engine.wanted(argv))
    from megatron_opt.training import arguments

    args = arguments.parse(argv)
    from megatron_opt.training import console
    from megatron_opt.training.job import train

    console.start(args)
    train(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 trained (also when the loss diverged), 2 bad input, 1 any other failure."""
    code, argv = 0, sys.argv[1:] if argv is None else argv
    try:
        run(argv)
    except (UserError, ModuleNotFoundError, OSError) as error:
        sentence = sentence_of(error, full)  # a file that cannot be read may be the file system's trouble, which passes
        if sentence is None:
            raise
        said = naming(str(sentence), argv)
        return entry.print_user_error("megatron_opt.pretrain", UserError(said))
    except RuntimeError as error:
        if not _PEER_GONE.search(str(error)):
            raise
        from megatron_opt.training import console

        console.keep(traceback.format_exc())
        gone = UserError(
            "another rank is gone, see its own lines and `megatron-opt status`; the launcher starts all again."
        )
        return entry.print_user_error("megatron_opt.pretrain", gone, 1, of_another=True)
    except SystemExit as leaving:
        code = signals.exit_code(leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code)))
    if not code:  # also by --exit-interval and its like
        entry.destroy_process_group()
    return code


if __name__ == "__main__":
    entry.run(main)
