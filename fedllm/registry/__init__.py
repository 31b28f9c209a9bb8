"""Immutable adapter versions, their files by content, and the aliases that move over them.

`model` is what others speak; `store.Registry` is the coordinator's writer (SQLAlchemy); `remote` reads from
outside. Nothing is imported here, so that reading `model` needs no database.
"""
