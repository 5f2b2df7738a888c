"""Where the runs of a study happen: in this process, in several, or on a Ray cluster.

An engine calls one function on shares of a list, in other processes or not at all; whatever it
leaves undone, the caller does. Leaves out what a run is (`grid`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, get_args

from smearlens._extras import extra

Engine = Literal["serial", "processes", "ray"]
Item = TypeVar("Item")
Run = Callable[[Sequence[Any]], None]

RETRIES = 3  # how often Ray starts a run again whose worker died; every time it resumes

_chosen: ContextVar[str] = ContextVar("engine", default="processes")


@contextmanager
def use_engine(engine: str) -> Iterator[None]:
    """Run every study inside on `engine`, as `--engine` does; the default is "processes".

    - `serial`: one run after another in this process, whatever `jobs` is
    - `processes`: in `jobs` processes of this machine
    - `ray`: `jobs` at a time on the cluster that `RAY_ADDRESS` names, or one made of this machine;
      needs the extra `ray`

    The numbers of a study are the same on each, to the last digit.

    Raises:
        ValueError: for another name
        MissingExtraError: for "ray" where it is not installed
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}")
    if engine == "ray":
        extra("ray", "ray")
    before = _chosen.set(engine)
    try:
        yield
    finally:
        _chosen.reset(before)


def chosen_engine() -> str:
    """The engine of the innermost `use_engine`."""
    return _chosen.get()


def run_elsewhere(run: Run, items: Sequence[Item], jobs: int) -> None:
    """Call `run` on shares of `items` as the chosen engine does, and wait; "serial" does nothing.

    Args:
        run: can be pickled; an exception in it ends its share, and is not raised here
        items: what there is to do
        jobs: shares at a time

    Raises:
        ValueError: for fewer jobs than 1
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if chosen_engine() == "ray" and items:
        _on_ray(run, items, jobs)
    elif chosen_engine() == "processes" and min(jobs, len(items)) > 1:
        _in_processes(run, items, jobs)


def _in_processes(run: Run, items: Sequence[Item], jobs: int) -> None:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    shares = [items[i::jobs] for i in range(min(jobs, len(items)))]
    workers = [context.Process(target=_work, args=(run, share), daemon=True) for share in shares]
    try:
        with _deaf_to_interrupts():
            for worker in workers:
                worker.start()
        for worker in workers:
            worker.join()
    except BaseException:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        raise


def _work(run: Run, share: Sequence[Any]) -> None:
    """What a worker does; told to end, it leaves by the door and takes its semaphores with it."""

    def leave(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        sys.exit(1)

    signal.signal(signal.SIGTERM, leave)
    run(share)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: the one that started them ends them, in silence."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say so
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _on_ray(run: Run, items: Sequence[Item], jobs: int) -> None:
    """One task of one CPU for each item, `jobs` of them at a time."""
    ray = extra("ray", "ray")
    own = not ray.is_initialized()
    if own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        local = {"num_cpus": jobs, "include_dashboard": False, "object_store_memory": 10**8}
        ray.init(**({} if os.environ.get("RAY_ADDRESS") else local), logging_level="warning")
    try:
        # a task that dies is called again, with the same item, on any worker of the cluster
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_from_folder)
        waiting, running = list(items), []
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(task.remote(os.getcwd(), run, waiting.pop(0)))
            done, running = ray.wait(running)
            for each in done:
                _settle(ray, each)
    finally:
        if own:
            ray.shutdown()


def _from_folder(folder: str, run: Run, item: Any) -> None:
    """Call `run` on one item in the folder of the caller: its paths may be relative."""
    os.chdir(folder)
    run([item])


def _settle(ray: Any, reference: Any) -> None:
    """Let a task that failed go: the caller does what it left undone, or fails in plain sight."""
    try:
        ray.get(reference)
    except ray.exceptions.RayError:
        return
