"""A federation of 3 to 1,000 owners in one process: the round code that ships, on a carrier that goes wrong on demand.

What is simulated is the training (a toy), the clock and the line between owners and coordinator. The protocol, the
round loop, the journal, the registry and every owner's daemon and ledger are the real ones.
"""
