"""What a stop or an interrupt leaves of a run, in words: the step from which the same command resumes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from most_ray.checkpoint import catalog
from most_ray.errors import Interrupted
from most_ray.io import storage


def saved_step(run_uri: str) -> int | None:
    """The step of a run's newest checkpoint; None where it has none, or its storage does not answer."""
    with contextlib.suppress(OSError):
        if found := catalog.committed(storage.join(run_uri, "checkpoints")):
            return catalog.step_of(found[-1])
    return None


def resuming_text(run_uri: str, given: str | None = None) -> str:
    """The step that the next attempt at a run resumes from, to follow "The workers were lost; ". `given`: resume_from_checkpoint."""
    step = saved_step(run_uri)
    if step is not None:
        return f"resuming from the checkpoint of step {step}"
    return "starting again from resume_from_checkpoint" if given else "starting again from step 0: there is no checkpoint yet"


def stopped_text(run_uri: str) -> str:
    """What was saved of a run that has stopped on request, to follow "was received: "."""
    step = saved_step(run_uri)
    return "a checkpoint was written" if step is None else f"the checkpoint of step {step} was written"


def newest_text(run_uri: str) -> str:
    """What there is of a run whose workers have ended without a checkpoint."""
    step = saved_step(run_uri)
    return "there is no checkpoint yet" if step is None else f"the newest checkpoint is that of step {step}"


@contextlib.contextmanager
def explained_interrupt(run_uri: str) -> Iterator[None]:
    """Let a Ctrl-C that ends a run at once say what the same command resumes from. Raises Interrupted instead of KeyboardInterrupt."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        step = saved_step(run_uri)
        resumes = "begins the run: it has no checkpoint yet" if step is None else f"resumes after step {step}"
        raise Interrupted(f"the same command {resumes}") from interrupt
