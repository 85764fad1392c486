"""What each op means, in plain PyTorch: obvious before fast, and the ground truth of every test."""
