"""How replies are computed, one at a time or in batches, and become text as they do."""
