"""What keeps a database from being used at all."""


class DatabaseFault(Exception):
    """The database cannot be used. The message says why, and holds no value of a row and no password."""


class UnfitRow(Exception):
    """Rows that a database cannot hold. The message names them by key (no address) or by rule, and says no more of them."""
