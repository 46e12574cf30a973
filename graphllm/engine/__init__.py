"""The step loop: admission, look-ahead, publishing, as one task on the server's event loop."""
