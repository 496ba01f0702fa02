"""The tasks of a study and what runs them: here, or in one process a core; each keeps its result when it is over.

A task computes with one thread, so that its result depends neither on the number of cores nor on who ran it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from fusedres.cli.study.data import Images
from fusedres.cli.study.settings import Settings
from fusedres.cli.study.store import Store
from fusedres.measuring.progress import Progress

TELL_EVERY = 1.0  # seconds
MOST_WORKERS = 8
SECONDS = "processor_seconds"


@dataclass(frozen=True)
class Context:
    """What every task is given."""

    settings: Settings
    images: Images
    store: Store


@dataclass(frozen=True)
class Task:
    """One piece of a study: `work(context, *arguments)` gives its result, as plain data.

    after: 0, or 1 for what needs the networks that tasks of 0 train.
    """

    name: str
    work: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...] = field(default=())
    after: int = 0


def cores() -> int:
    """Those that this process may use, eight at most: each worker holds torch, about 0.4 GB."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(mine, MOST_WORKERS)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside torch's operations and those of scikit-learn's libraries, within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def finish(context: Context, task: Task) -> None:
    """Keeps the task's result, with the processor's seconds that it took beside it."""
    with one_thread():
        start = time.process_time()
        found = task.work(context, *task.arguments)
        context.store.save(task.name, {**found, SECONDS: round(time.process_time() - start, 2)})


_context: Context | None = None  # of a worker process


def begin_worker(settings: Settings, images: Images, folder: Path) -> None:
    global _context
    _context = Context(settings, images, Store(folder))
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def finish_in_worker(task: Task) -> None:
    assert _context is not None
    finish(_context, task)


def run(context: Context, tasks: list[Task], workers: int, progress: Progress) -> None:
    """Whatever is not finished yet; an exception of a task ends the run, and what was finished stays."""
    done = sum(context.store.has(task.name) for task in tasks)
    for after in (0, 1):
        missing = [t for t in tasks if t.after == after and not context.store.has(t.name)]
        if workers == 1:
            for task in missing:
                progress(task.name, done, len(tasks))
                finish(context, task)
                done += 1
        elif missing:
            run_in_workers(context, missing, workers, partial(tell, progress, done, len(tasks)))
            done += len(missing)


def tell(progress: Progress, before: int, total: int, name: str, over: int) -> None:
    progress(name, before + over, total)


def run_in_workers(
    context: Context, tasks: list[Task], workers: int, told: Callable[[str, int], object]
) -> None:
    """
    Raises:
        OSError: a worker process was ended from outside.
    """
    begin = (context.settings, context.images, context.store.folder)
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads can hang
    with ProcessPoolExecutor(workers, spawn, begin_worker, begin) as pool:
        waiting: dict[Future[None], str] = {pool.submit(finish_in_worker, t): t.name for t in tasks}
        try:
            while waiting:
                told(next(iter(waiting.values())), len(tasks) - len(waiting))
                for future in wait(waiting, TELL_EVERY, FIRST_COMPLETED).done:
                    future.result()
                    del waiting[future]
        except BrokenProcessPool as error:
            raise OSError(
                "fusedres study: a worker was ended from outside, perhaps for want of memory; the same command with "
                f"fewer --workers than {workers} goes on from what is finished"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
