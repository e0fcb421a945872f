"""The demo reasoner: its network and training (PyTorch), and the evidence drawn from it."""
