"""Servers: models over HTTP, and the pages on which runs are watched."""
