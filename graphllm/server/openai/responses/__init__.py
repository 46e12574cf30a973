"""/v1/responses: the OpenAI Responses API, stateful where a client wants it."""
