"""`python -m gatelodge_server` is `gatelodge`."""

from gatelodge_server.cli import main

main()
