"""The one exception that users meet: a sentence saying what is wrong, where, and what to do about it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program is: a scheduler's way to interrupt, and like it no error."""


class StrideError(Exception):
    """Bad input, configuration or environment, told in one clear sentence.

    The command line prints the sentence alone and exits with status 1; any other exception is a defect of this
    package and keeps its traceback.
    """
