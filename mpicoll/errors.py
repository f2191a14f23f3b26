"""The exceptions whose text is for the person at the keyboard."""


class UserError(Exception):
    """One clear line: what is wrong, what was expected, what to do.

    Every rank of a job raises the same one; the command line prints it once, from rank 0, and exits
    with status 1.
    """


class MismatchError(RuntimeError):
    """Ranks do not make the same call; the text is a table of who made which.  All of them raise the same one."""


def reason(error: BaseException) -> str:
    """What it says, or, if it says nothing, what it is."""
    return str(error) or type(error).__name__
