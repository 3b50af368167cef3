"""Requests and responses, and what stands around them."""
