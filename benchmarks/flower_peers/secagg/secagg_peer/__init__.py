"""Flower's SecAgg+ as Flower ships it: the legacy workflow and its client mod."""
