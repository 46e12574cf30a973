"""The Anthropic API: messages, and what they would take."""
