"""Measured and published numbers, and the scripts that turn them into tables and figures."""
