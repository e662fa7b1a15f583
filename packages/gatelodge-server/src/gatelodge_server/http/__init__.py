"""The wire: requests become calls of the core, its answers and refusals become responses."""
