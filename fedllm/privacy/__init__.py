"""Differential privacy as plain numbers: clip, noise, account, remember.

`clip` and `noise` make a sum private, `mechanism` says what was done, `accountant` and `calibrate` turn it into
epsilon and back, and `ledger` is the owner's record of what was spent. numpy only; the accountant imports
dp-accounting when first asked.
"""
