"""The parts of a decoder, on flat token batches [num_tokens, hidden]."""
