"""What the bots share: loading a model, encoding a conversation, streaming its reply."""
