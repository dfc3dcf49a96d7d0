"""Models behind servers that speak OpenAI's protocol: asked many at once, read strictly, paid for once."""
