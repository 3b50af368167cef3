"""Flawed bots beside ours, each with one command."""
