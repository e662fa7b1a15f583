"""Durable state. Each verb is a function over a SQLAlchemy connection; a driver runs it in a transaction of its own."""
