"""Explain an error in one line that says what to do. Errors that no user can mend are defects and keep a traceback.

Libraries wrap each other's errors; the Hub's own, at the end of the chain of causes, says most.
"""

import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from .console import printable

_TEACHER = "Could not load the "  # begins what `load_teacher` says
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def explain(error: BaseException, *, smaller: str = "") -> str | None:
    """One line for the user, or None for what is no user's to mend.

    Args:
        smaller: the options that save memory.
    """
    for cause in _causes(error):
        if (said := _of_the_hub(cause)) or (said := _of_the_computer(cause, smaller)):
            context = str(error).partition("\n")[0]  # whose name is not in every answer
            return _one_line(f"{context} {said}" if cause is not error and context.startswith(_TEACHER) else said)
    if isinstance(error, ModuleNotFoundError):
        return f"{error}: `apm env` says what is missing, and how to add it"
    if isinstance(error, OSError) and error.strerror:  # without its number
        where = "" if error.filename is None else f"{error.filename}: "
        return _one_line(f"{where}{error.strerror}")
    return _one_line(str(error)) if isinstance(error, ValueError | OSError | ImportError) else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, the innermost first."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return reversed(chain)


def _of_the_computer(error: BaseException, smaller: str) -> str | None:
    torch = sys.modules.get("torch")
    out_of_memory = isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    # On the CPU, torch has no class of its own for it.
    if out_of_memory or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return f"out of memory: {smaller or 'a smaller image or model'} needs less"
    # Libraries that are not written in Python have errors of their own, with the system's words.
    if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
        file = getattr(error, "filename", None)
        where = f" (writing {os.fspath(file)})" if file is not None else ""
        return f"the disk is full{where}: make room, and start again"
    return None


def _of_the_hub(error: BaseException) -> str | None:
    # The client's own library has been `httpx` and is `httpx2`.
    if any((kind.__module__[:5], kind.__name__) == ("httpx", "TransportError") for kind in type(error).mro()):
        return f"the Hub cannot be reached ({error}): check the network, or use folders and HF_HUB_OFFLINE=1"
    from huggingface_hub import constants, errors

    offline = "HF_HUB_OFFLINE is set, and what is asked for is not in the cache: unset it once, or give a folder"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return offline
        return "the Hub cannot be reached, and what is asked for is not in the cache: check the network"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"no token for the Hub: {LOGIN}"
    return _of_an_answer(error) if isinstance(error, errors.HfHubHTTPError) else None


def _of_an_answer(error: Any) -> str | None:
    """Explain what the Hub replied to a request."""
    from huggingface_hub import errors

    repository, status = _repository(error), error.response.status_code
    server = error.server_message or str(error).splitlines()[0]
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated: ask for access on its page on the Hub, then {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no such revision: see its branches and tags on the Hub"
    if status == 401:
        return (
            f"the Hub does not let this in to {repository}: there is none of that name, or it is private, or the "
            f"token is missing or wrong; check the name, and {LOGIN} ({server})"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repository} is neither a folder here nor on the Hub, or it is private there: check the name, and for a "
            f"private one {LOGIN}"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{repository} lacks a file that is needed: {server}"
    if status == 403:
        return f"the token may not do this to {repository}: it needs the right to write there ({server})"
    if status == 429:
        return "the Hub was asked too often: wait a few minutes, and start again"
    if status >= 500:
        return f"the Hub is not well (it answered {status}): start again later"
    return f"the Hub answered {status}: {server}"


def _repository(error: Any) -> str:
    """Return its name, as far as the request says."""
    if name := getattr(error, "repo_id", None):
        return name
    path = urlsplit(str(error.response.url)).path
    # /api/models/user/name/..., /api/datasets/user/name/..., /user/name/resolve/...; /api/repos/create names none
    found = re.match(r"(?:/api/(?:models|datasets|spaces))?(?:/datasets|/spaces)?/((?!api/)[^/]+(?:/[^/]+)?)", path)
    return found[1] if found and not path.startswith("/api/repos") else "the repository"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
