"""The service: partners, credentials, sessions and the decisions about them, over HTTPS and kept durably."""
