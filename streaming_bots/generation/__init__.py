"""The code that computes replies, one at a time or in batches, and decodes them to text."""
