"""How learned numbers reach a server."""
