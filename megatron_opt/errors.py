"""The one exception that users meet: a sentence that names the cause and the remedy."""


class UserError(Exception):
    """Bad input (flag, data, checkpoint, environment); entry points print it without a traceback and exit 2."""
