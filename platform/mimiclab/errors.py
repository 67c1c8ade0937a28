"""What a user got wrong, as opposed to a bug."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message names the file, key or image, what was found and what was expected. The command
    line prints it without a traceback and exits with 2.
    """


class NoRetryError(RuntimeError):
    """Training cannot go on, and would fail in the same way if it were tried again; nobody's wrong input."""


class PreemptedError(NoRetryError):
    """Machines were taken more often than `scale.max_preemptions` allows."""
