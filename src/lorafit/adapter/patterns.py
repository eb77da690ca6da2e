"""Which names a pattern from a file matches, at a cost that is known before.

RE2 is linear in the length of pattern and name; Python's `re` can be kept busy for years by twenty characters.
"""

import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from lorafit.adapter.untrusted import plain, shown
from lorafit.errors import UsageError

MATCHING_SECONDS = 2.0  # of the processor, for one field
MATCHING_MEMORY = 8 * 2**20  # where 2000 layers with a pattern each take one second
# Look-around, back-references and the like, for which Python's matcher may take forever.
BEYOND_RE2 = ("invalid perl operator", "invalid escape", "invalid named", "invalid repetition", "bad repetition")
# What RE2 and Python read differently, so that it is never taken for something else: a{,3} [[:alpha:]] \12 \w of ä
READ_DIFFERENTLY = re.compile(r"\{,|\[:|\\[1-9]|[^\x00-\x7f]")


class BeyondRE2(UsageError):
    """A pattern that may well be one, but not for RE2."""


def first_matches(field: str, patterns: Sequence[str], names: Iterable[str], frame: str = "KEY") -> dict[str, int]:
    """For each name that one of `patterns` matches, the number of the first that does.

    A plain pattern has to match all of a name; one in a `frame`, which takes the place of KEY there, from its start.
    """
    too_costly = UsageError(f"{field}={shown(patterns[0])} is too costly to match: list the layers by name")
    rules = _automaton(field, patterns, frame)
    if rules is None:
        raise too_costly
    end, found = time.thread_time() + MATCHING_SECONDS, {}
    for name in names:
        first = min(rules.Match(name) or [-1])
        if first < 0 or time.thread_time() > end:
            raise too_costly
        if first < len(patterns):
            found[name] = first
    return found


def _automaton(field: str, patterns: Sequence[str], frame: str) -> Any:
    """All patterns in one, and behind them one that matches everything: should it not, the memory has run out.

    None if it has run out already.
    """
    import re2

    options = re2.Options()
    options.log_errors, options.never_capture, options.max_mem = False, True, MATCHING_MEMORY
    rules = re2.Set.FullMatchSet(options) if frame == "KEY" else re2.Set.MatchSet(options)
    for pattern in patterns:
        said = f"{field}={shown(pattern)}"
        framed = frame.replace("KEY", pattern)
        if READ_DIFFERENTLY.search(pattern):
            raise BeyondRE2(f"{said} means one thing to RE2 and another to Python: list the layers by name")
        try:
            rules.Add(framed)
        except re2.error:
            reason = _reason(framed, options)
            if reason.startswith(BEYOND_RE2):
                raise BeyondRE2(f"{said} might be matched forever ({reason}): list the layers by name") from None
            raise UsageError(f"{said} is no regular expression ({reason})") from None
    try:
        rules.Add(".*")
        rules.Compile()
        return rules
    except re2.error:
        return None


def _reason(pattern: str, options: Any) -> str:
    """What RE2 has against `pattern`; a set of patterns does not say."""
    import re2

    try:
        re2.compile(pattern, options)
    except re2.error as error:
        return plain(error.args[0].decode(errors="replace"), 80)
    return "too large"
