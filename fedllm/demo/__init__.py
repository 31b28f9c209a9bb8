"""The demo: real data split among four owners, real processes on one machine, one report."""
