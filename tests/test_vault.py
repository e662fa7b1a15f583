"""The master key: where it comes from, what comes from it, and that it stays where it is."""

import base64
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatelodge_server.core.refresh_tokens import RefreshTokens
from gatelodge_server.core.secrets import Secret
from gatelodge_server.vault import MasterKeyFault, MasterKeys, Vault, make_key_file, system_entropy

OLD, NEW = bytes(range(32)), bytes(range(100, 132))


def line(key):
    return base64.urlsafe_b64encode(key).decode().rstrip("=")


def vault(*keys):
    return Vault(MasterKeys(keys or (NEW,)), os.urandom)


def parse(text):
    return MasterKeys.parse(text, source="SOURCE")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "master.key"


def write(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return path


# --- Reading keys ---


def made(path, entropy):
    """The keys of a file that is made if it is not there."""
    make_key_file(path, entropy)
    return MasterKeys.load(path)


def test_keys_are_read_newest_first():
    assert parse(f"{line(NEW)}\n{line(OLD)}\n").keys == (NEW, OLD)


@pytest.mark.parametrize("frame", ["{}", "{}\n", "  {}  \n", "# made in spring\n\n{}\n", "{}=\n", "\r\n{}\r\n"])
def test_blank_lines_remarks_and_padding_are_no_matter(frame):
    assert parse(frame.format(line(NEW))).keys == (NEW,)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing here\n"])
def test_a_source_without_a_key_is_refused(text):
    with pytest.raises(MasterKeyFault, match="SOURCE holds no key"):
        parse(text)


@pytest.mark.parametrize(
    "text", ["x", line(NEW)[:-1], line(NEW) + "AAAA", line(NEW[:31]), line(NEW + b"x"), "ä" * 43, "=" * 44, "a b"]
)
def test_what_is_not_32_bytes_of_base64url_is_refused_without_being_shown(text):
    with pytest.raises(MasterKeyFault, match=r"SOURCE, line 2: not 32 bytes") as caught:
        parse(f"{line(OLD)}\n{text}\n")
    assert text not in str(caught.value).removeprefix("SOURCE, line 2: not 32 bytes as base64url")


@pytest.mark.parametrize("key", [bytes(32), b"\xff" * 32, b"secret!!" * 4, b"passwordpassword" * 2, b"abcdefg" * 4 + b"abcd"])
def test_r16_a_key_that_is_not_random_is_refused(key):
    if len(set(key)) >= 8:
        pytest.fail("this key has too many different bytes to be the case")
    with pytest.raises(MasterKeyFault, match="does not look random"):
        parse(line(key))


def test_r16_no_random_key_is_refused():
    for _ in range(2_000):
        parse(line(os.urandom(32)))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601, 0o610, 0o620, 0o602, 0o777])
def test_a_file_that_others_may_touch_is_refused(path, mode):
    with pytest.raises(MasterKeyFault, match=f"{mode:04o}"):
        MasterKeys.load(write(path, line(NEW), mode))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_file_that_is_its_owners_alone_is_read(path, mode):
    assert MasterKeys.load(write(path, line(NEW), mode)).keys == (NEW,)


def test_a_file_that_cannot_be_read_is_told(path):
    for make in (lambda: None, path.mkdir):
        make()
        with pytest.raises(MasterKeyFault, match="cannot be read"):
            MasterKeys.load(path)


def test_a_file_that_is_no_text_is_told_and_not_shown(path):
    path.write_bytes(b"\xc3\xa9secret-bytes")
    path.chmod(0o600)
    with pytest.raises(MasterKeyFault, match="cannot be read") as caught:
        MasterKeys.load(path)
    assert "secret-bytes" not in str(caught.value)


# --- Making one ---


def test_a_key_is_made_for_its_owner_alone(path):
    keys = made(path, os.urandom)
    assert path.stat().st_mode & 0o777 == 0o600
    assert MasterKeys.load(path).keys == keys.keys
    assert len(keys.keys) == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_key_that_is_there_is_never_replaced(path):
    first = made(path, os.urandom)
    assert made(path, os.urandom).keys == first.keys
    assert list(path.parent.iterdir()) == [path]


def test_what_a_crash_left_behind_does_no_harm(path):
    """A process that died half-way leaves a draft; another with its number, or any other, starts all the same."""
    drafts = [path.with_name(f".{path.name}.{pid}") for pid in (os.getpid(), 1)]
    for draft in drafts:
        write(draft, "half a key, or much more than one " * 100)
    keys = made(path, os.urandom)
    assert MasterKeys.load(path).keys == keys.keys
    assert path.read_text().count("\n") == 1


def test_a_crash_before_the_key_has_its_name_leaves_no_key(path):
    def dies(size):
        raise SystemExit

    with pytest.raises(SystemExit):
        made(path, dies)
    assert not path.exists()
    assert made(path, os.urandom).keys


def test_processes_that_make_a_key_at_once_have_one(path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gatelodge_server.vault import MasterKeys, make_key_file, system_entropy\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for at in range(50):\n"
        "    path = Path(f'{sys.argv[1]}-{at}')\n"
        "    make_key_file(path, system_entropy)\n"
        "    print(MasterKeys.load(path).keys[0].hex())\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) == 50
    assert len(list(path.parent.iterdir())) == 50


# --- What comes from it ---


def test_what_an_older_key_made_is_honoured_and_new_things_are_made_under_the_newest():
    before, during, after = vault(OLD), vault(NEW, OLD), vault(NEW)
    mac, sealed = before.make_mac(b"message"), before.seal(b"private", label=b"label")
    assert during.check_mac(b"message", mac)
    assert during.open(sealed, label=b"label") == b"private"
    assert not after.check_mac(b"message", mac)
    with pytest.raises(ValueError, match="not among the present"):
        after.open(sealed, label=b"label")
    assert during.make_mac(b"message") == after.make_mac(b"message") != mac
    assert after.open(during.seal(b"new", label=b"label"), label=b"label") == b"new"
    assert during.digest(b"m", purpose="p") == after.digest(b"m", purpose="p") != before.digest(b"m", purpose="p")


def test_refresh_tokens_outlive_a_change_of_the_master_key():
    def tokens(keeper):
        return RefreshTokens(brand="gatelodge", environment="uat", make_mac=keeper.make_mac, check_mac=keeper.check_mac)

    old = tokens(vault(OLD)).write(bytes(16), 7)
    assert tokens(vault(NEW, OLD)).read(old).generation == 7
    new = tokens(vault(NEW, OLD)).write(bytes(16), 7)
    assert new.reveal() != old.reveal()
    assert tokens(vault(NEW)).read(Secret(new.reveal())).generation == 7


@given(st.binary(max_size=200), st.binary(max_size=50))
def test_what_is_sealed_opens_with_its_label(plaintext, label):
    keeper = vault()
    assert keeper.open(keeper.seal(plaintext, label=label), label=label) == plaintext


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_what_is_sealed_opens_with_no_other_label(label, other):
    sealed = vault().seal(b"private", label=label)
    if label != other:
        with pytest.raises(ValueError, match="seal"):
            vault().open(sealed, label=other)


def test_a_seal_with_any_bit_changed_or_cut_off_does_not_open():
    sealed = vault().seal(b"private", label=b"label")
    broken = [sealed[:at] + bytes([sealed[at] ^ 1 << bit]) + sealed[at + 1 :] for at in range(len(sealed)) for bit in range(8)]
    broken += [sealed[:at] for at in range(len(sealed))] + [sealed + b"x"]
    for one in broken:
        with pytest.raises(ValueError):
            vault().open(one, label=b"label")


def test_the_same_is_never_sealed_the_same_way_twice():
    keeper = vault()
    assert len({keeper.seal(b"private", label=b"label") for _ in range(100)}) == 100


def test_a_mac_is_right_for_its_message_under_its_key_only():
    mac = vault().make_mac(b"message")
    assert len(mac) == 32
    assert vault().check_mac(b"message", mac)
    assert vault().check_mac(b"message", mac[:24])
    assert not vault().check_mac(b"message ", mac)
    assert not vault().check_mac(b"message", mac[1:])
    assert not vault().check_mac(b"message", mac + b"\0")
    assert not vault(OLD).check_mac(b"message", mac)


def test_a_digest_stands_for_one_message_and_one_purpose():
    keeper = vault()
    digests = {
        keeper.digest(b"message", purpose="a"),
        keeper.digest(b"message", purpose="b"),
        keeper.digest(b"other", purpose="a"),
        keeper.digest(b"", purpose="a"),
        keeper.make_mac(b"a\0message"),
    }
    assert len(digests) == 5
    assert {len(digest) for digest in digests} == {32}
    assert keeper.digest(b"message", purpose="a") == keeper.digest(b"message", purpose="a")


def test_r69_no_key_is_shown():
    keys = MasterKeys((NEW, OLD))
    for shown in (repr(keys), str(keys), repr(vault(NEW, OLD)), f"{keys}", repr(replace(keys))):
        assert repr(NEW)[2:-1] not in shown
        assert line(NEW) not in shown
        assert NEW.hex() not in shown


def test_entropy_comes_from_the_system_in_the_size_that_was_asked_for():
    assert [len(system_entropy(size)) for size in (0, 1, 32)] == [0, 1, 32]
    assert system_entropy(32) != system_entropy(32)
