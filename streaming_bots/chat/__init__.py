"""Conversations over a WebSocket, and the web page for them."""
