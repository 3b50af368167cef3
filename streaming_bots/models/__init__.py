"""The code that loads a language model by its name, and tokenizes conversations to fit it."""
