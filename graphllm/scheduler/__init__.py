"""What runs next: pure Python, no tensors, so that it can be simulated by the million steps."""
