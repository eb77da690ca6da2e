"""What takes too long for the test suite: every promise of the README tried thousands of times.

`python -m soak` runs the parts, one module each with

    NAME    what `--only` takes                    COUNT   how many cases
    WHAT    the promise tested, one sentence       LONG    how many with --long
    run     run(case, folder) -> None when the promise held, else one sentence on how it was broken

and, where the defaults do not fit,

    PASS    the share of cases that has to hold (1.0)
    LIMIT   seconds after which a case counts as broken (600)
    SOURCES the folders whose change makes results stale (src and soak)

Case number n is the same case on every machine: whatever is random in it is drawn from n.
"""
