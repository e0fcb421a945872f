"""The demo reasoner as all others know it: its problems, its vocabulary, its model file."""
