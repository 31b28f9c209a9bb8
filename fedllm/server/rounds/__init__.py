"""A round, one file per phase, and the runner that takes it through them.

Each phase is one or two calls of `context.RoundContext.gather`: ask, verify, journal, close. Run again after a
crash, a closed phase answers from the journal, so the same code both runs a round and resumes it.
"""
