"""HTTP requests and responses, and the code around them."""
