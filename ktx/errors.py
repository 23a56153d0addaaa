"""What can go wrong for a user, each with the exit status of the command that meets it.

A message is one line: where (file, tensor, line), what was found, what to do.
"""

from __future__ import annotations


class KtxError(Exception):
    """Base of every error that is the user's to mend; anything else is a bug in ktx.

    `exit_code`: of a command; `status`: of an HTTP answer; `code`: a word for programs that read such an answer;
    `retry`: seconds after which the same request may succeed.
    """

    exit_code = 1
    status = 500
    code = ""
    retry: int | None = None


class UsageError(KtxError):
    """A flag, rule or argument that cannot mean anything."""

    exit_code = 2
    status = 400


class ContextExceeded(UsageError):
    """A prompt, or a prompt and the answer that is asked for, that the context does not hold."""

    code = "context_length_exceeded"


class DoesNotFit(KtxError):
    """The machine has too little memory, or disk, for the request."""

    exit_code = 3


class BadFile(KtxError):
    """A file that is missing, damaged, of an unknown kind, or does not belong to this model."""

    exit_code = 4


class NoGradient(UsageError):
    """Autograd, or forward-mode differentiation, would record what has no gradient; forward raises it."""


class SelfTestFailed(KtxError):
    """A model that was loaded computes what cannot be right: its cache is not read, or numbers are none."""

    exit_code = 4


class Overloaded(KtxError):
    """An engine that takes no request now: the same request may be answered later."""

    exit_code = 5
    status = 503
    retry = 1


class QueueFull(Overloaded):
    """Too many requests at once."""

    status = 429
    code = "queue_full"


def did_you_mean(word: str, known: object) -> str:
    """ " (did you mean 'x'?)" for the known name closest to `word`, or the empty string."""
    from difflib import get_close_matches

    close = get_close_matches(word, [str(name) for name in known], n=1, cutoff=0.5)  # type: ignore[attr-defined]
    return f" (did you mean {close[0]!r}?)" if close else ""
