"""The routes that clients of OpenAI's API know."""
