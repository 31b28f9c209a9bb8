"""Base models: known names, fetching without a hub, conversion, shape and digest of a folder."""
