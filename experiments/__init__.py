"""Experiments: each proves one promise of the product against a real server, and shows on a broken one that it could fail."""
