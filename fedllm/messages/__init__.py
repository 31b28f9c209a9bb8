"""What crosses the line between an owner and the coordinator: versioned, strict, canonical bytes.

An update has no wire codec, only a masked one has: nothing in this package can carry float parameters of an
owner. `plan` is what a round is, `envelope` how a message is signed and bound, `round` and `secagg` the bodies.
"""
