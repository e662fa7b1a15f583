"""What a well-formed token must be and say to be believed, and in which order that is found out."""

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gatelodge.errors import CredentialExpired, InvalidCredential, Rejected, WrongEnvironment
from gatelodge.tokens import TokenRules, VerificationKey, public_jwk, read_unverified, sign_token, verify_token
from gatelodge.wire import ACCESS_TYPES, SESSION_TYPES, TOKEN_MAX_LENGTH

ELSEWHERE = "https://elsewhere.example"


def refusal(issuer, text, **how):
    with pytest.raises(Rejected) as caught:
        issuer.judge(text, **how)
    return type(caught.value)


def test_a_session_jwt_is_believed(issuer):
    assert issuer.judge(issuer.token()) == issuer.claims()


def test_an_access_token_is_believed_however_old(issuer):
    claims = issuer.judge(issuer.access_token(), rules=issuer.access_rules, now=issuer.now + 10**9)
    assert claims["sub"] == "acme-motors"
    assert "exp" not in claims


def test_another_implementation_believes_what_we_sign_and_we_what_it_signs(issuer):
    public_key = issuer.key.public_key()
    theirs = jwt.decode(
        issuer.token(), public_key, ["ES256"], audience=issuer.url, options={"verify_exp": False, "verify_iat": False}
    )
    assert theirs == issuer.claims()
    text = jwt.encode(issuer.claims(), issuer.key, "ES256", headers={"kid": issuer.kid, "typ": "at+jwt"})
    assert issuer.judge(text) == issuer.claims()


def test_what_is_signed_survives_text_of_every_kind(issuer):
    claims = issuer.claims(note='é "quoted" \\ 😀 \x00')
    assert issuer.judge(sign_token(claims, key=issuer.key, kid=issuer.kid, typ="at+jwt")) == claims


@pytest.mark.parametrize("secret_of", [
    lambda key: key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    lambda key: key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    lambda key: key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
])  # fmt: skip
def test_r1_the_public_key_is_no_shared_secret(issuer, secret_of):
    signing_input = issuer.compact(issuer.header | {"alg": "HS256"}, issuer.claims()).rpartition(".")[0]
    mac = HMAC(secret_of(issuer.key.public_key()), SHA256())
    mac.update(signing_input.encode())
    text = f"{signing_input}.{jwt.utils.base64url_encode(mac.finalize()).decode()}"
    assert refusal(issuer, text) is InvalidCredential
    # The same bytes passed off as the key's own algorithm.
    assert refusal(issuer, text.replace(text.split(".", maxsplit=1)[0], issuer.token().split(".")[0])) is InvalidCredential


@pytest.fixture(scope="module")
def rsa_key():
    return rsa.generate_private_key(65537, 2048)


SIGNERS = {
    "ES384": lambda key, data: jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA384).sign(data, key),
    "EdDSA": lambda key, data: key.sign(data),
    "RS256": lambda key, data: key.sign(data, padding.PKCS1v15(), SHA256()),
    "PS256": lambda key, data: key.sign(data, padding.PSS(padding.MGF1(SHA256()), 32), SHA256()),
    "RS384": lambda key, data: key.sign(data, padding.PKCS1v15(), SHA384()),
}


def signed(issuer, key, algorithm, *, header_algorithm=None):
    header = issuer.header | {"kid": "k", "alg": header_algorithm or algorithm}
    signing_input = issuer.compact(header, issuer.claims()).rpartition(".")[0]
    signature = jwt.utils.base64url_encode(SIGNERS[algorithm](key, signing_input.encode())).decode()
    return f"{signing_input}.{signature}"


@pytest.mark.parametrize("algorithm", ["ES384", "EdDSA", "RS256", "PS256"])
def test_r2_every_algorithm_of_the_table_verifies_with_its_key_and_no_other(issuer, rsa_key, algorithm):
    private = {"ES384": ec.generate_private_key(ec.SECP384R1()), "EdDSA": ed25519.Ed25519PrivateKey.generate()}.get(
        algorithm, rsa_key
    )
    key = VerificationKey("k", algorithm, private.public_key())
    assert issuer.judge(signed(issuer, private, algorithm), key=key) == issuer.claims()
    for other in {"ES256", "ES384", "EdDSA", "RS256", "PS256"} - {algorithm}:
        assert refusal(issuer, signed(issuer, private, algorithm, header_algorithm=other), key=key) is InvalidCredential


def test_r2_a_key_for_ps256_verifies_no_rs256_and_the_reverse(issuer, rsa_key):
    for bound, used in [("PS256", "RS256"), ("RS256", "PS256")]:
        key = VerificationKey("k", bound, rsa_key.public_key())
        assert refusal(issuer, signed(issuer, rsa_key, used), key=key) is InvalidCredential
        # Even when the header lies about it, the padding is the key's.
        assert refusal(issuer, signed(issuer, rsa_key, used, header_algorithm=bound), key=key) is InvalidCredential
    assert refusal(issuer, signed(issuer, rsa_key, "RS384"), key=key) is InvalidCredential


def test_r2_a_key_is_used_for_its_own_kid_only(issuer):
    renamed = VerificationKey("another", "ES256", issuer.key.public_key())
    assert refusal(issuer, issuer.token(), key=renamed) is InvalidCredential


def test_r4_a_token_whose_kid_nobody_knows_is_invalid(issuer):
    with pytest.raises(InvalidCredential):
        verify_token(read_unverified(issuer.token()), key=None, rules=issuer.session_rules, now=issuer.now)


def test_r9_both_spellings_of_the_session_type_are_taken(issuer):
    for typ in SESSION_TYPES:
        assert issuer.judge(issuer.token(typ)) == issuer.claims()


@pytest.mark.parametrize(
    "typ",
    [
        "JWT",
        "jwt",
        "AT+JWT",
        "At+jwt",
        "at+jwt ",
        "application/AT+JWT",
        "jwt+at",
        "at",
        "",
        "dpop+jwt",
        "application/jwt",
    ],
)
def test_r9_any_other_type_is_no_session_jwt(issuer, typ):
    assert refusal(issuer, issuer.token(typ)) is InvalidCredential


@pytest.mark.parametrize("typ", [*SESSION_TYPES, "jwt", "application/jwt", ""])
def test_r9_any_other_type_is_no_access_token(issuer, typ):
    text = issuer.token(typ, exp=...)
    assert refusal(issuer, text, rules=issuer.access_rules) is InvalidCredential


def test_r9_no_token_passes_for_the_other_kind(issuer):
    assert refusal(issuer, issuer.token(), rules=issuer.access_rules) is InvalidCredential
    assert refusal(issuer, issuer.access_token()) is InvalidCredential
    # With the type swapped, the expiry still tells them apart.
    assert refusal(issuer, issuer.token("JWT"), rules=issuer.access_rules) is InvalidCredential
    assert refusal(issuer, issuer.token("at+jwt", exp=...)) is InvalidCredential
    assert set(SESSION_TYPES).isdisjoint(ACCESS_TYPES)


@pytest.mark.parametrize(
    "iss",
    [
        ...,
        None,
        "",
        7,
        ["https://uat.example.com"],
        "https://uat.example.com/",
        "https://uat.example.co",
        "https://UAT.example.com",
        "http://uat.example.com",
        " https://uat.example.com",
        {"https://uat.example.com": 1},
    ],
)
def test_r10_the_issuer_is_compared_exactly(issuer, iss):
    assert refusal(issuer, issuer.token(iss=iss)) is InvalidCredential


@pytest.mark.parametrize(
    "aud",
    [
        ...,
        None,
        "",
        7,
        [],
        ["https://api.example.com"],
        "https://api.example.com",
        "https://uat.example.com/",
        ["https://uat.example.com/"],
        ["https://uat.example.com", 7],
        [["https://uat.example.com"]],
        {"https://uat.example.com": 1},
    ],
)
def test_r11_a_token_for_another_audience_is_refused(issuer, aud):
    assert refusal(issuer, issuer.token(aud=aud)) is InvalidCredential


def test_r11_an_audience_may_be_one_of_several(issuer):
    assert issuer.judge(issuer.token(aud=["https://other.example", issuer.url]))


def test_r11_a_token_of_the_other_environment_is_told_so_before_its_signature_is_looked_at(issuer, stranger):
    rules = TokenRules.for_sessions(issuer=issuer.url, audience=issuer.url, other_issuers=frozenset({issuer.production}))
    foreign = issuer.token(iss=issuer.production, aud=issuer.production)
    forged = issuer.compact(issuer.header, issuer.claims(iss=issuer.production), stranger.key)
    for text in [foreign, forged]:
        assert refusal(issuer, text, rules=rules) is WrongEnvironment
        with pytest.raises(WrongEnvironment):
            verify_token(read_unverified(text), key=None, rules=rules, now=issuer.now)
    # Whoever is no environment of the same owner is told nothing.
    assert refusal(issuer, issuer.token(iss=ELSEWHERE), rules=rules) is InvalidCredential


def test_r11_a_key_of_one_environment_signs_nothing_for_the_other(issuer, stranger):
    """Another environment's key signs a token that claims to be of this one."""
    text = sign_token(issuer.claims(), key=stranger.key, kid=stranger.kid, typ="at+jwt")
    assert refusal(issuer, text) is InvalidCredential
    assert refusal(issuer, text.replace(text.split(".")[0], issuer.token().split(".")[0])) is InvalidCredential


@pytest.mark.parametrize("leeway", [0, 60])
def test_r12_the_second_of_expiry_is_expired(issuer, leeway):
    rules = TokenRules.for_sessions(issuer=issuer.url, audience=issuer.url, leeway=leeway)
    end = issuer.now + 86_400 + leeway
    assert issuer.judge(issuer.token(), rules=rules, now=end - 1)
    assert issuer.judge(issuer.token(), rules=rules, now=end - 0.001)
    assert refusal(issuer, issuer.token(), rules=rules, now=end) is CredentialExpired
    assert refusal(issuer, issuer.token(), rules=rules, now=end + 1) is CredentialExpired


@pytest.mark.parametrize("leeway", [0, 60])
def test_r12_a_token_is_good_from_its_first_second(issuer, leeway):
    rules = TokenRules.for_sessions(issuer=issuer.url, audience=issuer.url, leeway=leeway)
    text, begin = issuer.token(nbf=issuer.now + 100), issuer.now + 100 - leeway
    assert refusal(issuer, text, rules=rules, now=begin - 1) is InvalidCredential
    assert issuer.judge(text, rules=rules, now=begin)
    assert issuer.judge(text, rules=rules, now=begin + 1)


def test_r12_an_access_token_heeds_its_first_second_too(issuer):
    text = issuer.access_token(nbf=issuer.now + 1)
    assert refusal(issuer, text, rules=issuer.access_rules) is InvalidCredential
    assert issuer.judge(text, rules=issuer.access_rules, now=issuer.now + 1)


NO_TIME = ["1780086400", "", True, False, None, 1780086400.0, 1780086400.5, -1, -1.5, 10**12, [1780086400], {}]


@pytest.mark.parametrize("value", [*NO_TIME, ...])
def test_r12_an_expiry_that_is_no_time_is_invalid_and_not_expired(issuer, value):
    assert refusal(issuer, issuer.token(exp=value)) is InvalidCredential


@pytest.mark.parametrize("number", [b"1e400", b"-1e400", b"NaN", b"Infinity", b"1780086400.0", b"1.7800864e9", b"9" * 400])
def test_r12_an_expiry_that_is_no_whole_number_is_invalid(issuer, number):
    payload = issuer.compact(issuer.header, b'{"exp":%b}' % number)
    with pytest.raises(InvalidCredential):
        issuer.judge(payload)
    claims = b'{"exp":%b,' % number + str(issuer.claims(exp=...)).replace("'", '"').encode()[1:]
    assert refusal(issuer, issuer.compact(issuer.header, claims)) is InvalidCredential


@pytest.mark.parametrize("value", NO_TIME)
def test_r12_so_it_is_with_the_other_times(issuer, value):
    assert refusal(issuer, issuer.token(nbf=value)) is InvalidCredential
    assert refusal(issuer, issuer.token(iat=value)) is InvalidCredential


def test_r12_an_issuer_whose_clock_is_ahead_is_believed(issuer):
    """RFC 7519 4.1.6 gives `iat` no part in the verdict; `nbf` is there for that."""
    assert issuer.judge(issuer.token(iat=issuer.now + 5))


@pytest.mark.parametrize(("leeway", "good"), [(-1, False), (0, True), (1, True), (59, True), (60, True), (61, False)])
def test_r12_the_leeway_is_a_minute_at_most(leeway, good):
    if good:
        assert TokenRules("i", "a", ("t",), "expires", leeway).leeway == leeway
    else:
        with pytest.raises(ValueError, match="leeway"):
            TokenRules("i", "a", ("t",), "expires", leeway)


SESSION_TEXTS = ["sub", "jti", "client_id", "sid"]


@pytest.mark.parametrize("name", [*SESSION_TEXTS, "iss", "aud", "iat", "exp"])
def test_r13_a_session_jwt_without_a_required_claim_is_refused(issuer, name):
    assert refusal(issuer, issuer.token(**{name: ...})) is InvalidCredential


@pytest.mark.parametrize("name", ["sub", "jti", "iss", "aud", "iat"])
def test_r13_an_access_token_without_a_required_claim_is_refused(issuer, name):
    assert refusal(issuer, issuer.access_token(**{name: ...}), rules=issuer.access_rules) is InvalidCredential


@pytest.mark.parametrize("name", SESSION_TEXTS)
@pytest.mark.parametrize("value", ["", None, 7, True, ["a"], {"a": 1}, "x" * 256])
def test_r13_a_claim_that_identifies_is_a_short_text(issuer, name, value):
    assert refusal(issuer, issuer.token(**{name: value})) is InvalidCredential


@pytest.mark.parametrize(("length", "good"), [(254, True), (255, True), (256, False)])
def test_r13_such_a_text_has_255_characters_at_most(issuer, length, good):
    text = issuer.token(sub="x" * length)
    assert issuer.judge(text) if good else refusal(issuer, text) is InvalidCredential


def test_r17_a_forged_token_is_told_nothing_whatever_it_claims(issuer, stranger):
    """All of these would have another answer if the signature were good."""
    for claims in [
        issuer.claims(),
        issuer.claims(exp=1),
        issuer.claims(iss=ELSEWHERE),
        issuer.claims(partner="other"),
        {},
    ]:
        forged = issuer.compact(issuer.header, claims, stranger.key)
        assert refusal(issuer, forged) is InvalidCredential


def test_r17_only_a_token_that_is_right_in_all_else_is_called_expired(issuer):
    expired = {"exp": issuer.now - 1}
    assert refusal(issuer, issuer.token(**expired)) is CredentialExpired
    for wrong in [
        {"iss": ELSEWHERE},
        {"aud": ELSEWHERE},
        {"sub": ...},
        {"sid": 7},
        {"iat": "1"},
        {"nbf": issuer.now + 1},
    ]:
        assert refusal(issuer, issuer.token(**expired, **wrong)) is InvalidCredential
    assert refusal(issuer, issuer.token("JWT", **expired)) is InvalidCredential


def test_r17_every_bit_of_a_token_is_signed(issuer):
    text = issuer.token()
    for at in range(0, len(text), 7):
        twin = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
        assert refusal(issuer, twin) is InvalidCredential


@pytest.mark.parametrize(
    "signature", [b"", b"\x00" * 64, b"\xff" * 64, b"\x01" * 63, b"\x01" * 65, b"\x30\x06\x02\x01\x01\x02\x01\x01"]
)
def test_r17_a_signature_that_is_none_is_refused(issuer, signature):
    """Among them the all-zero one that some libraries once took for good, and the DER form."""
    lead = issuer.token().rpartition(".")[0]
    with pytest.raises(InvalidCredential):
        issuer.judge(f"{lead}.{jwt.utils.base64url_encode(signature).decode()}")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"issuer": ""}, ValueError),
        ({"audience": ""}, ValueError),
        ({"types": ()}, ValueError),
        ({"types": "at+jwt"}, TypeError),
        ({"lifetime": "forever"}, ValueError),
        ({"other_issuers": frozenset({"i"})}, ValueError),
        ({"other_issuers": "https://i"}, TypeError),
    ],
)
def test_rules_that_would_judge_wrongly_cannot_be_made(change, error):
    good = {"issuer": "i", "audience": "a", "types": ("t",), "lifetime": "expires"}
    assert TokenRules(**good)
    with pytest.raises(error):
        TokenRules(**good | change)


def test_a_token_too_long_to_be_accepted_is_not_made(issuer):
    with pytest.raises(ValueError, match=str(TOKEN_MAX_LENGTH)):
        issuer.token(pad="x" * TOKEN_MAX_LENGTH)


def test_a_claim_that_is_no_json_is_not_signed(issuer):
    with pytest.raises(ValueError, match="JSON compliant"):
        issuer.token(exp=float("nan"))


@pytest.mark.parametrize("kid", ["", "a b", "../k", "k" * 129])
def test_a_token_is_not_signed_under_a_name_that_no_verifier_takes(issuer, kid):
    with pytest.raises(ValueError, match="kid"):
        sign_token(issuer.claims(), key=issuer.key, kid=kid, typ="at+jwt")


def test_signing_twice_gives_two_signatures_of_one_text(issuer):
    first, second = issuer.token().split("."), issuer.token().split(".")
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert public_jwk(issuer.key) == issuer.jwk
