"""From a checkpoint on disk to a decoder with its weights."""
