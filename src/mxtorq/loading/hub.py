"""What the Hugging Face hub did not give: in words for a person, without its client's log.

A mistyped folder looks like the name of a model on the hub, and the client then asks the hub, five
times more where there is no network, with two lines of log each time. The user asked for a folder
and reads about HEAD requests. Here the answer becomes one sentence that says both: there is no
such folder, and why the hub was no help.

The client's logger is set back when a model was read: a library does not configure logging for the
program that it is in. Its retries stay, since a network may come back; they cost half a minute
where it does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR

OLD_NAME = (
    "a name without a slash is a folder, or one of the hub's oldest models, such as gpt2; others "
    "have the form organisation/model"
)
"""Why a name such as ``nofolder`` is probably a slip."""


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the hub's client from telling each of its retries; errors are still told."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(max(before, ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


def not_had(error: BaseException) -> str | None:
    """Why a name that is no folder gave no model; None where the hub has it and something else is
    wrong with it."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    step: BaseException | None = error
    while step is not None:
        if isinstance(step, GatedRepoError):  # which is a RepositoryNotFoundError too
            return None
        if isinstance(step, RepositoryNotFoundError):
            return "no folder of that name here, and on the hub no such model, or a private one"
        if isinstance(step, LocalEntryNotFoundError):
            why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "no network, or the hub is down"
            return (
                f"no folder of that name here, and the hub could not be reached ({why}) and its "
                "cache does not have such a model"
            )
        step = step.__cause__
    return None
