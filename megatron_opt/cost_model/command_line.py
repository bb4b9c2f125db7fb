"""What the commands `cost` and `migrate` share: one sentence for bad words, missing extras and files."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_opt.errors import UserError

EXTRAS = {"scipy": "study", "matplotlib": "study", "pyarrow": "study"}


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        """One sentence in place of the usage."""
        raise UserError(f"{message}; see {self.prog} --help.")


@contextmanager
def one_sentence(command: str) -> Iterator[None]:
    """A package of an extra that is missing, and a file that cannot be read or written, as UserError."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        raise UserError(f"{command} needs {package}, which is missing; pip install 'megatron_opt[{extra}]'.") from error
    except OSError as error:
        raise UserError(f"{error.filename or command}: {error.strerror or error}; name another file.") from error
