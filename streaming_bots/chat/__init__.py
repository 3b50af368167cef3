"""Conversations over a WebSocket, and the page to have them on."""
