"""One operation a file: formula, plain-torch reference, later the Triton kernel."""
