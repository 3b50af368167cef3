"""A language model by name, and a conversation as token ids that fit it."""
