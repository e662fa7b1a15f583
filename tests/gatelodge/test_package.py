"""What the package shows, what it needs, and that its first page tells the truth."""

import contextlib
import importlib.metadata
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gatelodge
from gatelodge import errors

README = Path(gatelodge.__file__).parents[2] / "README.md"

CODES = {
    "InvalidCredential": "invalid_credential",
    "CredentialExpired": "credential_expired",
    "CredentialRevoked": "credential_revoked",
    "CredentialRotated": "credential_rotated",
    "WrongEnvironment": "wrong_environment",
    "PartnerSuspended": "partner_suspended",
    "PartnerMismatch": "partner_mismatch",
}


def test_a_refusals_code_never_changes():
    assert {kind.__name__: kind.code for kind in errors.Rejected.__subclasses__()} == CODES
    assert errors.KeysUnavailable.code == "keys_unavailable"
    assert not issubclass(errors.KeysUnavailable, errors.Rejected)


@pytest.mark.parametrize("kind", errors.Rejected.__subclasses__())
def test_a_refusal_says_one_thing_and_takes_nothing_to_repeat(kind):
    assert str(kind()) == kind.detail
    assert re.fullmatch(r"The [^\n]+\.", kind.detail)
    with pytest.raises(TypeError):
        kind("eyJhbGciOi")


def test_the_public_surface_is_this_and_no_more():
    assert gatelodge.__all__ == sorted(gatelodge.__all__)
    assert set(gatelodge.__all__) == {
        "AccessRing", "ApiKey", "Caller", "CredentialExpired", "CredentialRevoked", "CredentialRotated", "Fault", "Gate",
        "Grant", "InvalidCredential", "JwtMarks", "Keys", "KeysUnavailable", "PartnerMismatch", "PartnerSuspended", "QuotaExceeded",
        "Records", "Rejected", "RemoteKeys", "RemoteRevocations", "Revocations", "RevocationsUnavailable", "StaticKeys",
        "TokenRules", "Unavailable", "VerificationKey", "Verifier", "WrongEnvironment", "caller_of", "https_fetch",
    }  # fmt: skip
    assert all(hasattr(gatelodge, name) for name in gatelodge.__all__)


def test_the_package_says_that_it_is_typed():
    assert (Path(gatelodge.__file__).parent / "py.typed").is_file()


def test_the_package_asks_for_two_others_only():
    names = {re.match(r"[A-Za-z0-9-]+", line)[0] for line in importlib.metadata.requires("gatelodge") if "extra ==" not in line}
    assert {name.lower() for name in names} == {"pyjwt", "cryptography"}


ALONE = """
import sys

ALLOWED = {"gatelodge", "jwt", "cryptography", "cffi", "_cffi_backend", "pycparser", "typing_extensions"} | sys.stdlib_module_names

class Gate:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError("not a base dependency: " + name, name=name)

sys.meta_path.insert(0, Gate())

import pkgutil
import gatelodge

for module in pkgutil.iter_modules(gatelodge.__path__, "gatelodge."):
    __import__(module.name)

from gatelodge.tokens import *
key = generate_private_key()
jwk = public_jwk(key)
text = sign_token({"iss": "i"}, key=key, kid=jwk["kid"], typ="JWT")
assert read_unverified(text).issuer == "i"
try:
    import starlette
except ModuleNotFoundError:
    print("alone")
"""


def test_the_package_works_with_its_two_dependencies_alone():
    done = subprocess.run([sys.executable, "-W", "error", "-c", ALONE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alone\n", "")


def test_the_readmes_examples_run_one_after_the_other_and_print_what_they_say():
    examples = re.findall(r"```python\n(.*?)```.*?```text\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(examples) == README.read_text("utf-8").count("```python") > 1
    names = {}
    for code, told in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), "exec"), names)
        assert printed.getvalue() == told


def test_the_readmes_table_names_every_code():
    table = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", README.read_text("utf-8"), re.MULTILINE))
    assert table == CODES | {
        "KeysUnavailable": "keys_unavailable",
        "RevocationsUnavailable": "revocations_unavailable",
    }


@pytest.mark.parametrize(
    ("marking", "told"),
    [("production", "the environment `production`"), (None, "another environment"), ("uat`\r\n", "another environment")],
)
def test_the_holder_of_another_environments_credential_is_told_which_it_is(marking, told):
    refused = errors.WrongEnvironment(environment=marking)
    assert told in refused.detail
    assert errors.WrongEnvironment.detail in {refused.detail, errors.WrongEnvironment().detail}
