"""Verify the credentials of a Gatelodge partner API."""
