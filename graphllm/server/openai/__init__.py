"""The OpenAI API: one file an endpoint, and what they share."""
