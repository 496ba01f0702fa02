"""The trials of this process by what they are of, and how their verdicts get into the user's table and out of it."""

from __future__ import annotations

import threading
import time
from typing import Any

from fusedres.blocks import user_table
from fusedres.blocks.user_table import UNFUSED, Entry, Key
from fusedres.trials import proof_record, settings
from fusedres.trials.trial import Ratio, Trial, Verdict

SOURCE = "trial"
MOST_TRIALS = 4096
_trials: dict[Key, Trial] = {}
_kept: set[Key] = set()  # whose verdicts are in the table, or came out of it
_lock = threading.RLock()


def without_candidates(why: str) -> Trial:
    """One that is over before it began."""
    found = Trial((), time.monotonic)
    found.verdict = Verdict(UNFUSED, None, why)
    return found


def trial_of(key: Key, candidates: tuple[str, ...]) -> Trial:
    """The one trial of this process for the key: settled where the user's table has an entry, else a new one."""
    with _lock:
        found = _trials.get(key)
        if found is None:
            if len(_trials) >= MOST_TRIALS:
                return without_candidates("too many kinds of calls in this process")
            entry = user_table.table().get(key)
            found = Trial(candidates, time.monotonic)
            if entry is not None and entry.recipe in (UNFUSED, *candidates):
                found.verdict = verdict_of(entry)
                _kept.add(key)
            _trials[key] = found
        return found


def is_known(key: Key) -> bool:
    """Whether a verdict for the key needs no call to be measured."""
    return key in user_table.table() or (key in _trials and _trials[key].verdict is not None)


def verdict_of(entry: Entry) -> Verdict:
    return Verdict(entry.recipe, Ratio(entry.ratio, entry.ratio, entry.ratio))


def keep(key: Key, recipe: str, ratio: Ratio | None) -> None:
    """Writes what was found for a key into the user's table, once; a trial that found nothing out leaves nothing."""
    with _lock:
        if key in _kept:
            return
        _kept.add(key)
    if ratio is None:
        return
    try:
        user_table.write({key: Entry(recipe, round(ratio.median, 4), SOURCE)})
    except OSError as error:
        proof_record.warn_unwritable(str(user_table.path()), str(error))


def summary() -> dict[str, Any]:
    """Whether calls are measured in this process, and what was found on this machine so far."""
    off = settings.off_because()
    return {
        "measured_in_first_steps": "yes" if off is None else f"no: {off}",
        "table": str(user_table.path()),
        "found_so_far": sum(key.exact for key in user_table.table()),
        "proofs_so_far": len(proof_record.records()),
    }


def forget() -> None:
    """Every trial begins anew, but for what the user's table has."""
    with _lock:
        _trials.clear()
        _kept.clear()
