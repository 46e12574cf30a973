"""What the API's dialects share: from a checked body to a running request, and from its tokens to an answer.

One kind of request (`request.py`) stands behind every endpoint that generates. A dialect is an adapter: a
struct that its bodies are decoded into, a translation to that request, and a wire that writes its shapes.
"""
