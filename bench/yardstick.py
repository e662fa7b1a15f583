"""A yardstick for the machine: bare uvicorn with as little as a login could be. It checks nothing and keeps nothing.

Machines differ by a factor of three in what a login costs them; a rate that stands beside this one of the same round says more
than the rate alone.
"""

import base64
import hashlib
import hmac
import json
import os
import socket
import time
from typing import Any

import jwt
import uvicorn

from gatelodge.tokens import generate_private_key

KEY = generate_private_key()
CLAIMS = {
    "iss": "https://lodge.example", "sub": "acme-motors", "aud": "partner-api-uat", "client_id": "c" * 12, "sid": "5" * 32,
    "env": "uat", "kind": "partner", "partner": "acme-motors", "tier": "starter", "scope": "api companies",
}  # fmt: skip


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer a constant, or sign a JWT for whoever asks."""
    if scope["method"] == "GET":
        answer = b'{"status":"alive"}'
    else:
        presented = json.loads((await receive())["body"])
        digest = hashlib.sha256(presented.get("apiKey", presented.get("refreshToken")).encode()).digest()
        now = int(time.time())
        claims = {**CLAIMS, "iat": now, "exp": now + 86_400, "jti": os.urandom(16).hex()}
        token = jwt.encode(claims, KEY, "ES256", {"kid": "k" * 43, "typ": "at+jwt"})
        refresh = base64.urlsafe_b64encode(os.urandom(16) + hmac.digest(digest, token.encode(), "sha256")).decode()
        answer = json.dumps({"jwt": token, "expirationDate": "", "refreshToken": refresh}).encode().replace(b'": "', b'":"')
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def main() -> None:
    """Serve on a free port and say which."""
    sock = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"port": sock.getsockname()[1]}), flush=True)
    server = uvicorn.Server(
        uvicorn.Config(app, loop="uvloop", http="httptools", lifespan="off", access_log=False, log_level="warning")
    )
    server.run([sock])


if __name__ == "__main__":
    main()
