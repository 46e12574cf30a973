"""One operation a file: formula, plain-torch reference, Triton kernel, launcher."""
