"""The exception for user errors: one sentence with what is wrong, where, and how to fix it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as an exception; like Ctrl-C, an interruption and not an error."""


class StrideError(Exception):
    """Bad input, configuration or environment, described in one sentence.

    The command line prints only this sentence and exits with status 1. Any other exception is a bug in this package
    and keeps its traceback.
    """
