"""The gate of a deployment in an application of your own, in its process: no proxy between, and no other server needed.

::

    lodge = open_lodge()
    app = FastAPI(lifespan=lambda _: at_work(lodge))
    app.add_middleware(Gate, verifier=lodge.verifier, count=lodge.turnstile)

Any number of such processes, of `gatelodge serve` and of commands work on one database at once. What one of them revokes is
refused by all, and what one of them lets in is counted for all.
"""

import os
from collections.abc import Mapping

import structlog

from gatelodge_server.app import Lodge, assemble, at_work
from gatelodge_server.deployment import StartFault, load_master_keys, prepare, smtp_password
from gatelodge_server.log import configure_log
from gatelodge_server.settings import SettingsFault, load_settings
from gatelodge_server.vault import Vault, system_entropy

__all__ = ["Lodge", "SettingsFault", "StartFault", "at_work", "open_lodge"]


def open_lodge(environ: Mapping[str, str] = os.environ) -> Lodge:
    """The parts of the deployment that `GATELODGE_DATA` and the other settings in ``environ`` name, for one event loop.

    What a first start makes is made if it is not there. Raises ``SettingsFault`` or ``StartFault``, which say what to do.
    The application enters ``at_work`` for as long as it runs.
    """
    if not structlog.is_configured():  # else the log is the application's affair, and it has seen to it
        configure_log()
    settings = prepare(load_settings({}, environ), environ)
    vault = Vault(load_master_keys(settings, environ), system_entropy)
    return assemble(settings, vault, smtp_password=smtp_password(environ))
