"""KV memory: which block belongs to whom, and the tensors behind the blocks."""
