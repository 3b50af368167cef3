"""The smallest bot and the experiments of the tutorial."""
