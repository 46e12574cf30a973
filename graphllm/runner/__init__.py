"""Runs a scheduled step on a device: persistent buffers, the two phases of a step, sampling."""
