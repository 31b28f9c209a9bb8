"""The data owner's side: private records, local training, the owner's policy, and the daemon that guards them.

`trainer` is the port the round sees; `train` and `dpsgd` are the real one (torch), `toy` the fake that runs a
whole federation in a second. Importing this package imports none of torch, transformers, peft and opacus.
"""
