"""The domain: what may happen, decided without HTTP, SQL or files. Imports the standard library and ``gatelodge`` only."""
