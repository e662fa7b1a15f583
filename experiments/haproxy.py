"""HAProxy in front of several nodes, as an operator would have it: TLS ends here, readiness decides, no request is sent twice.

Retries are for connections that could not be made: then no byte of the request has left, and another node takes it. A request
that was sent and lost its connection is answered with 502, because nobody knows whether it was heard.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tests import processes

from experiments.daemon import Daemon, status_of

_STATUS_PATH: Final = "/is-haproxy-up"

_GLOBAL: Final = """\
global
  maxconn 4000
  log stdout format raw local0 notice
  ssl-default-bind-options ssl-min-ver TLSv1.2

defaults
  mode http
  log global
  timeout connect 1s
  timeout client 75s
  timeout server 75s
  timeout http-request 10s
  timeout check 2s
  retries 3
  retry-on conn-failure
  option redispatch 1
  option forwardfor

frontend status
  bind 127.0.0.1:{status_port}
  monitor-uri {status_path}

frontend gatelodge
  bind 127.0.0.1:{port}{tls}
  http-request set-header X-Forwarded-Proto https
  default_backend nodes

backend nodes
  balance roundrobin
  option httpchk
  http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host localhost hdr X-Forwarded-Proto https
  http-check expect status 200
  default-server check inter {interval} fastinter {interval} downinter {interval} fall 1 rise 1
"""


@dataclass(frozen=True, slots=True)
class Backend:
    """A node: its port, and the authority of its certificate, or ``None`` if it speaks plain HTTP behind a proxy."""

    port: int
    authority: Path | None = None


class HaProxy:
    """The proxy. ``certificate`` and ``key`` are what it shows its clients; without them it speaks plain HTTP.

    Nodes that speak plain HTTP have to trust it: ``--behind-proxy 127.0.0.0/8``.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        interval: str = "100ms",
    ) -> None:
        self.root = processes.working_directory("haproxy")
        self.port = processes.free_port()
        self._status_port = processes.free_port()
        tls = ""
        if certificate is not None and key is not None:
            tls = f" ssl crt {self._own('server.pem', certificate.read_text() + key.read_text())}"
        text = _GLOBAL.format(
            status_port=self._status_port, status_path=_STATUS_PATH, port=self.port, tls=tls, interval=interval
        )
        for number, backend in enumerate(backends):
            text += f"  server n{number} 127.0.0.1:{backend.port}"
            if backend.authority is not None:
                authority = self._own(f"authority-{number}.pem", backend.authority.read_text())
                text += f" ssl verify required ca-file {authority} sni str(localhost) verifyhost localhost"
            text += "\n"
        self._configuration = self._own("haproxy.cfg", text)
        program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin")
        assert program is not None, "haproxy is not installed"
        # Not as a master with workers (-W): one process is what is killed and frozen. SIGUSR1 would let connections finish.
        self._daemon = Daemon("haproxy", [program, "-db", "-f", str(self._configuration)], root=self.root)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        processes.remove(self.root)

    def start(self) -> None:
        """Start; it may be that no node is ready yet."""
        self._daemon.start(lambda: status_of(self._status_port, _STATUS_PATH) == 200)

    def kill(self) -> None:
        """SIGKILL."""
        self._daemon.kill()

    def log(self) -> str:
        """What it said, of nodes that went and came among other things."""
        return self._daemon.log()

    def _own(self, name: str, text: str) -> Path:
        path = self.root / name
        path.touch(mode=0o600)
        path.write_text(text)
        processes.hand_over(path)
        return path
