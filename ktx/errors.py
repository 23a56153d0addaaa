"""The errors that a user can fix, each with an exit status for commands and an HTTP status for the server.

A message is one line: where (file, tensor, line), what was found, what to do.
"""

from __future__ import annotations


class KtxError(Exception):
    """Base of every error that a user can fix; any other exception is a bug in ktx.

    Attributes:
        exit_code: the exit status of a command.
        status: the status of an HTTP response.
        code: the error code in the response, for programs.
        retry: the number of seconds after which the same request may succeed; None when it cannot.
    """

    exit_code = 1
    status = 500
    code = ""
    retry: int | None = None


class UsageError(KtxError):
    """An invalid flag, rule or argument."""

    exit_code = 2
    status = 400


class ContextExceeded(UsageError):
    """A prompt, or a prompt plus its requested output, that is longer than the context."""

    code = "context_length_exceeded"


class DoesNotFit(KtxError):
    """The machine has too little memory or disk space."""

    exit_code = 3


class BadFile(KtxError):
    """A file that is missing, damaged, of an unsupported format, or does not belong to this model."""

    exit_code = 4


class NoGradient(UsageError):
    """Raised by a forward when autograd or forward-mode differentiation would record an operation without gradient."""


class SelfTestFailed(KtxError):
    """The self-test found that a loaded model computes wrong results: a cache that is ignored, or non-finite values."""

    exit_code = 4


class Overloaded(KtxError):
    """The engine accepts no request at the moment; the same request may succeed later."""

    exit_code = 5
    status = 503
    retry = 1


class QueueFull(Overloaded):
    """Too many concurrent requests."""

    status = 429
    code = "queue_full"


def did_you_mean(word: str, known: object) -> str:
    """ " (did you mean 'x'?)" for the known name closest to `word`, or the empty string."""
    from difflib import get_close_matches

    close = get_close_matches(word, [str(name) for name in known], n=1, cutoff=0.5)  # type: ignore[attr-defined]
    return f" (did you mean {close[0]!r}?)" if close else ""
