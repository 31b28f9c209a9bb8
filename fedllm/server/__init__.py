"""The coordinator: federations, the round loop and its journal, the gate, the control API."""
