"""What keeps the bots from breaking: everything around the lesson that each of them is."""
