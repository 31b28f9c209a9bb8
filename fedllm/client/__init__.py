"""The data owner's daemon: the only program that sees raw text, an unmasked update, or an epsilon it can trust."""
