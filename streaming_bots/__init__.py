"""The code around the bots that keeps them from breaking. Each bot's own file is a lesson."""
