"""The one exception that users meet: a sentence that names the cause and the remedy; and a guess at what they meant."""

import argparse
import difflib
import errno
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn


class UserError(Exception):
    """Bad input (flag, data, checkpoint, environment); entry points print it without a traceback and exit 2."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def unusable(error: OSError) -> UserError | None:
    """A file or folder that cannot be read or written, as a sentence; None for what has nothing to do with either."""
    if error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}; name another file.")
    return full(error)


def full(error: OSError) -> UserError | None:
    """A disk that is full or read-only, as a sentence; None for any other trouble, which may pass."""
    if error.errno not in _FULL:
        return None
    what = error.filename or "the output"
    return UserError(f"{what} cannot be written: {error.strerror}; make room or name another folder.")


def naming(sentence: str, argv: Sequence[str]) -> str:
    """The sentence, led by the flag whose value it speaks of where it names no flag itself."""
    if re.search(r"(?<!\w)--[a-z]", sentence):
        return sentence
    flag = ""
    for word in argv:
        name, equals, value = word.partition("=") if word.startswith("--") else (flag, "=", word)
        flag = name if word.startswith("--") else flag
        plain = value.strip() and not re.fullmatch(r"[\d.]+", value)
        if flag and equals and plain and re.search(rf"(?<![\w/.-]){re.escape(value)}(?!\w)", sentence):
            return f"{flag}: {sentence}"
    return sentence


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like `word`; None where none is."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, cutoff)), None)


def nearest_or_all(word: str, known: Iterable[str], others: str = "there are", quote: str = "`") -> str:
    """ "did you mean `NAME`?", or all known words where none is near."""
    known = list(dict.fromkeys(known))
    near = nearest(word, known)
    return f"did you mean {quote}{near}{quote}?" if near else f"{others} {', '.join(known)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean NAME?", with the known word nearest to `word`; empty where none is near."""
    plain = {name.lower().replace("_", "-"): name for name in known}
    asked = word.lower().replace("_", "-")
    # a word with its last part forgotten: lr-warmup has lr-warmup-iters, though warmup is nearer
    near = sorted((name for name in plain if name.startswith(f"{asked}-")), key=len)[:1]
    if not near:
        near = [close] if (close := nearest(asked, plain, cutoff=0.7)) else []
    if not near:  # --learning-rate is --lr
        initials = "".join(part[0] for part in asked.strip("-").split("-") if part)
        near = [name for name in plain if len(initials) > 1 and name.strip("-") == initials]
    return f" Did you mean {plain[near[0]]}?" if near else ""


def explained(parser: argparse.ArgumentParser, message: str) -> str:
    """argparse's complaint as a sentence, with the flag or choice that was probably meant in place of all that there are."""
    if match := re.match(r"argument (.*?): invalid choice: '?(.*?)'? \(choose from (.*)\)$", message, re.S):
        name, given, choices = match.groups()
        words = [word.strip("' \"") for word in choices.split(",")]
        name = name.split("/")[-1]
        what = f"{name} {given}" if name.startswith("-") else f"{given!r}"
        return f"{what} is none of {', '.join(words)}.{did_you_mean(given, words)}"
    if match := re.match(r"unrecognized arguments: (.*)$", message, re.S):
        flags = [word.split("=")[0] for word in match[1].split() if word.startswith("--")]
        known = [name for action in parser._actions for name in action.option_strings]
        guesses = "".join(did_you_mean(flag, known) for flag in flags[:1])
        return f"{flags[0]} is no flag here.{guesses}" if flags else f"{match[1].split()[0]!r} belongs to no flag."
    if match := re.match(r"argument (.*?): (invalid (\S+) value: .*|expected .*)$", message, re.S):
        name, what, kind = match[1].split("/")[-1], match[2], match[3]
        wants = {"int": "it must be a whole number", "float": "it must be a number"}.get(kind or "")
        return f"{name}: {what}" + (f"; {wants}." if wants else ".")
    if match := re.match(r"argument (\S+): (.*)$", message, re.S):
        message = f"{match[1].split('/')[-1]}: {match[2]}"
    return message[:1].lower() + message[1:] + ("" if message.endswith((".", "?")) else ".")


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are UserErrors; the command line gives its `error` to every parser."""

    def error(self, message: str) -> NoReturn:
        """One sentence in place of the usage."""
        raise UserError(f"{explained(self, message)} See {self.prog} --help.")


def number(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, whole: bool = False
) -> Callable[[str], float]:
    """An argparse type: finite numbers from `low` (or only above it) to `high`; argparse names the flag."""
    kind = "whole number" if whole else "finite number"
    least = f" {'above' if above else 'of at least'} {low:g}" if low > -math.inf else ""
    most = f"{' and' if least else ''} at most {high:g}" if high < math.inf else ""

    def read(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not (value > low if above else value >= low) or value > high:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind}{least}{most}")
        return value

    return read
