"""What is published of a key, and which keys are taken."""

import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwt.utils import base64url_decode, base64url_encode

from gatelodge.tokens import (
    UnsupportedKey,
    VerificationKey,
    generate_private_key,
    private_key_from_bytes,
    private_key_to_bytes,
    public_jwk,
    thumbprint,
)

# The product of the primes from 2 to 167, all of which the faulty generator of CVE-2017-15361 used.
PRIMORIAL = 1
for _candidate in range(2, 168):
    if all(_candidate % divisor for divisor in range(2, _candidate)):
        PRIMORIAL *= _candidate


def b64(value):
    data = value.to_bytes((value.bit_length() + 7) // 8, "big") if isinstance(value, int) else value
    return base64url_encode(data).decode()


def rsa_jwk(n, e=65537, **changes):
    return {"kty": "RSA", "alg": "RS256", "kid": "k", "n": b64(n), "e": b64(e)} | changes


@pytest.fixture(scope="module")
def rsa_modulus():
    return rsa.generate_private_key(65537, 2048).public_key().public_numbers().n


def der(key):
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def test_a_private_key_comes_back_from_its_bytes():
    key = generate_private_key()
    assert private_key_from_bytes(private_key_to_bytes(key)).private_numbers() == key.private_numbers()


@pytest.mark.parametrize(
    "data_of",
    [
        lambda: b"",
        lambda: b"\x30",
        lambda: der(ec.generate_private_key(ec.SECP384R1())),
        lambda: der(ed25519.Ed25519PrivateKey.generate()),
    ],
    ids=["empty", "cut", "P-384", "Ed25519"],
)
def test_nothing_but_a_p256_key_is_read_as_a_signing_key(data_of):
    with pytest.raises(ValueError):
        private_key_from_bytes(data_of())


def test_r18_a_published_key_shows_its_public_half_only(issuer):
    jwk = public_jwk(issuer.key)
    assert set(jwk) == {"kty", "crv", "x", "y", "kid", "use", "alg"}
    assert (jwk["kty"], jwk["crv"], jwk["use"], jwk["alg"]) == ("EC", "P-256", "sig", "ES256")
    secret = issuer.key.private_numbers().private_value.to_bytes(32, "big")
    assert all(base64url_decode(jwk[name]) != secret for name in ("x", "y"))
    assert VerificationKey.from_jwk(jwk).public_key == issuer.key.public_key()


def test_r18_a_coordinate_is_written_in_full_whatever_its_leading_zeroes():
    """One in 128 keys has one; this is the first found by counting up."""
    scalar = 1
    while (key := ec.derive_private_key(scalar, ec.SECP256R1())).public_key().public_numbers().x.bit_length() > 248:
        scalar += 1
    jwk = public_jwk(key)
    assert len(jwk["x"]) == len(jwk["y"]) == 43
    assert VerificationKey.from_jwk(jwk).public_key == key.public_key()
    with pytest.raises(ValueError, match="coordinate"):
        VerificationKey.from_jwk(jwk | {"x": b64(base64url_decode(jwk["x"])[1:])})


def test_r19_the_kid_is_the_thumbprint_of_the_required_members_in_order(issuer):
    jwk = public_jwk(issuer.key)
    text = json.dumps({name: jwk[name] for name in ("crv", "kty", "x", "y")}, separators=(",", ":"))
    assert jwk["kid"] == b64(hashlib.sha256(text.encode()).digest())
    assert thumbprint(dict(reversed(jwk.items()))) == thumbprint(jwk) == jwk["kid"]


def test_r19_the_thumbprint_is_that_of_the_rfc():
    """RFC 7638 3.1 and RFC 8037 A.3."""
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMs"
        "tn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n"
        "91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    rsa_key = {"kty": "RSA", "n": modulus, "e": "AQAB", "alg": "RS256", "kid": "2011-04-29"}
    assert thumbprint(rsa_key) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
    okp = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    assert thumbprint(okp) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


@pytest.mark.parametrize(
    "jwk",
    [
        {},
        {"kty": "oct", "k": "AA"},
        {"kty": ["EC"]},
        {"kty": "EC", "crv": "P-256", "x": "AA"},
        {"kty": "RSA", "n": 5, "e": "AQAB"},
    ],
)
def test_r19_a_key_without_the_required_members_has_no_thumbprint(jwk):
    with pytest.raises(ValueError):
        thumbprint(jwk)


def test_keys_of_every_kind_in_the_table_are_read(rsa_modulus):
    ed = ed25519.Ed25519PrivateKey.generate().public_key()
    point = ec.generate_private_key(ec.SECP384R1()).public_key().public_numbers()
    ed_jwk = {
        "kty": "OKP",
        "crv": "Ed25519",
        "alg": "EdDSA",
        "kid": "k",
        "x": b64(ed.public_bytes(Encoding.Raw, PublicFormat.Raw)),
    }
    p384 = {
        "kty": "EC",
        "crv": "P-384",
        "alg": "ES384",
        "kid": "k",
        "x": b64(point.x.to_bytes(48, "big")),
        "y": b64(point.y.to_bytes(48, "big")),
    }
    for jwk in [ed_jwk, p384, rsa_jwk(rsa_modulus), rsa_jwk(rsa_modulus, alg="PS256", use="sig")]:
        key = VerificationKey.from_jwk(jwk)
        assert (key.kid, key.algorithm) == ("k", jwk["alg"])
        for name in ("d", "p", "q", "dp", "dq", "qi", "oth", "k"):
            with pytest.raises(ValueError, match="private"):
                VerificationKey.from_jwk(jwk | {name: "AA"})


@pytest.mark.parametrize(
    ("change", "unsupported"),
    [
        ({"alg": ...}, True),
        ({"alg": "ES256K"}, True),
        ({"alg": "HS256"}, True),
        ({"alg": "none"}, True),
        ({"alg": ["ES256"]}, True),
        ({"use": "enc"}, True),
        ({"alg": "ES384"}, False),
        ({"alg": "RS256"}, False),
        ({"alg": "EdDSA"}, False),
        ({"kty": "OKP"}, False),
        ({"kty": ["EC"]}, False),
        ({"kty": ...}, False),
        ({"crv": "P-384"}, False),
        ({"crv": "secp256k1"}, False),
        ({"crv": ...}, False),
        ({"kid": ...}, False),
        ({"kid": ""}, False),
        ({"kid": "a b"}, False),
        ({"kid": 7}, False),
        ({"x": ...}, False),
        ({"x": 7}, False),
        ({"x": "AA"}, False),
        ({"x": "!" * 43}, False),
        ({"x": "A" * 43}, False),
    ],
)
def test_r2_r18_a_key_that_is_not_wholly_of_one_known_kind_is_refused(issuer, change, unsupported):
    jwk = {name: value for name, value in (issuer.jwk | change).items() if value is not ...}
    with pytest.raises(ValueError) as caught:
        VerificationKey.from_jwk(jwk)
    assert isinstance(caught.value, UnsupportedKey) is unsupported


def test_r2_a_key_cannot_be_bound_to_an_algorithm_of_another_kind(issuer, rsa_modulus):
    p256, p384 = issuer.key.public_key(), ec.generate_private_key(ec.SECP384R1()).public_key()
    k1 = ec.generate_private_key(ec.SECP256K1()).public_key()
    big = rsa.RSAPublicNumbers(65537, rsa_modulus).public_key()
    ed = ed25519.Ed25519PrivateKey.generate().public_key()
    good = [("ES256", p256), ("ES384", p384), ("RS256", big), ("PS256", big), ("EdDSA", ed)]
    for algorithm in ["ES256", "ES384", "RS256", "PS256", "EdDSA"]:
        for key in [
            p256,
            p384,
            k1,
            big,
            ed,
            x25519.X25519PrivateKey.generate().public_key(),
            issuer.key,
            b"secret",
            None,
        ]:
            if (algorithm, key) in good:
                assert VerificationKey("k", algorithm, key).public_key == key
            else:
                with pytest.raises(ValueError):
                    VerificationKey("k", algorithm, key)
    for algorithm in ["HS256", "none", "es256", ""]:
        with pytest.raises(UnsupportedKey):
            VerificationKey("k", algorithm, p256)


@pytest.mark.parametrize(
    ("bits", "good"), [(2047, False), (2048, True), (2049, True), (8191, True), (8192, True), (8193, False)]
)
def test_r22_an_rsa_key_has_2048_to_8192_bits(bits, good):
    jwk = rsa_jwk((1 << bits) - 1)
    if good:
        assert VerificationKey.from_jwk(jwk)
    else:
        with pytest.raises(ValueError, match="bits"):
            VerificationKey.from_jwk(jwk)


@pytest.mark.parametrize(
    ("exponent", "good"),
    [
        (1, False),
        (2, False),
        (3, False),
        (65535, False),
        (65536, False),
        (65537, True),
        (65538, False),
        (65539, True),
        (2**64 - 1, True),
        (2**64 + 1, False),
    ],
)
def test_r22_an_rsa_exponent_is_odd_and_not_small(rsa_modulus, exponent, good):
    jwk = rsa_jwk(rsa_modulus, exponent)
    if good:
        assert VerificationKey.from_jwk(jwk)
    else:
        with pytest.raises(ValueError, match="exponent"):
            VerificationKey.from_jwk(jwk)


def test_r22_a_modulus_of_the_faulty_generator_is_refused(rsa_modulus):
    for power in (1, 2, 12345):
        lucky = pow(65537, power, PRIMORIAL) + PRIMORIAL * (rsa_modulus // PRIMORIAL)
        assert lucky.bit_length() == 2048
        with pytest.raises(ValueError, match="factored"):
            VerificationKey.from_jwk(rsa_jwk(lucky))


def test_r22_a_weak_key_is_refused_whichever_way_it_comes():
    weak = rsa.generate_private_key(65537, 1024).public_key()
    with pytest.raises(ValueError, match="bits"):
        VerificationKey("k", "RS256", weak)


def test_a_verification_key_can_be_a_member_of_a_set(issuer):
    assert len({issuer.verification_key, issuer.verification_key}) == 1
