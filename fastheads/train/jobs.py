"""Jobs: calls of a function in processes of their own, through submitit; a lock, so that no two work in a folder."""

from __future__ import annotations

import fcntl
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastheads.train.progress import phase

LONG = 30 * 24 * 60  # minutes: a local job ends when it is done


def run_jobs(
    function: Callable[..., str | None],
    calls: Mapping[str, Sequence[Any]],
    folder: Path,
    *,
    processes: int = 1,
    cluster: str = "local",
    parameters: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Calls `function` with each of the arguments, by name, and waits; submitit's files and the logs lie in `folder`.

    processes: of local jobs, so many at a time; a cluster's scheduler gets all. parameters: of submitit's
    `update_parameters`. say: called with a line for each job that ends. Interrupted or terminated, it cancels the jobs.

    Returns name → what went wrong, in a line: what the function returned, or how the job ended.
    Raises ValueError for a cluster that isn't there, or parameters that submitit doesn't have.
    """
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**({"timeout_min": LONG} if cluster == "local" else {}) | dict(parameters or {}))
    except (NameError, RuntimeError, TypeError, ValueError, AssertionError) as e:
        raise ValueError(f"submit: {' '.join(str(e).split())}") from e
    left, running, failed = dict(calls), dict[str, Any](), dict[str, str]()
    most = processes if cluster == "local" else max(1, len(calls))
    with phase("jobs", len(calls), "jobs") as advance, _terminated_as_interrupted():
        try:
            while left or running:
                while left and len(running) < most:
                    name = next(iter(left))
                    running[name] = executor.submit(function, *left.pop(name))
                for name in [name for name, job in running.items() if job.done()]:
                    error = _error(running.pop(name))
                    if error:
                        failed[name] = error
                    say(f"{name}: {error or 'done'}")
                    advance(1)
                if running:
                    time.sleep(0.5)
        finally:
            for job in running.values():
                job.cancel(check=False)
    return failed


def _error(job: Any) -> str | None:
    """What went wrong with a job that ended, in a line; None where nothing did."""
    exception = job.exception()
    if exception is None:
        result: str | None = job.result()
        return result
    if type(exception).__name__ == "UncompletedJobError":
        what = "ended without a result, killed perhaps"
    else:
        lines = [
            line for line in str(exception).splitlines() if line.strip() and not line.startswith((" ", "-", "You"))
        ]
        what = lines[-1] if lines else type(exception).__name__
    return f"{what}; the log is {job.paths.stderr}"


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is in here with the same folder: a job whose sweep was killed may work on."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with phase(f"waiting for another process in {folder}"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
