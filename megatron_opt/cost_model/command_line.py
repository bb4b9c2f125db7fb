"""What the commands `cost` and `migrate` share: one sentence for bad words and files."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_opt.errors import UserError, explained


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        """One sentence in place of the usage."""
        raise UserError(f"{explained(self, message)} See {self.prog} --help.")


@contextmanager
def one_sentence(command: str) -> Iterator[None]:
    """A file that cannot be read or written, as UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or command}: {error.strerror or error}; name another file.") from error
