"""The demo reasoner: its problems (pure standard library) and its training (PyTorch)."""
