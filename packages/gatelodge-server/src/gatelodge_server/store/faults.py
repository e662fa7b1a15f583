"""What keeps a database from being used at all."""


class DatabaseFault(Exception):
    """The database cannot be used. The message says why, and holds no value of a row and no password."""
