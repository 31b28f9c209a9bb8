"""What is computed from updates: pure arithmetic on sums, no input or output, numpy only.

`fixedpoint` turns floats into ring integers, `vector` says what is in each masked sum, `plain` is the unmasked
twin of the secure sum, `methods` and `rules` turn the opened sum into the next adapter, and `secagg` (which
alone uses cryptography) opens the sum without opening any summand.
"""
