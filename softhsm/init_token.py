"""The part of `init-token` that talks to the module: PKCS#11 calls through ctypes, standard library alone.

`softhsm2-util --pin` would show the PINs to everybody who can list processes. Here they never leave this process and
the two files they are kept in.
"""

import ctypes
import fcntl
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CK_ULONG = ctypes.c_ulong
CKR_OK = 0
CKU_SO = 0
CKF_RW_SERIAL_SESSION = 0x2 | 0x4
CKF_USER_PIN_INITIALIZED = 0x8
CKF_TOKEN_INITIALIZED = 0x400
LABEL_BYTES = 32


class TokenInfo(ctypes.Structure):
    """CK_TOKEN_INFO of PKCS#11 2.40."""

    _fields_ = (
        ("label", ctypes.c_char * LABEL_BYTES),
        ("manufacturer", ctypes.c_char * 32),
        ("model", ctypes.c_char * 16),
        ("serial", ctypes.c_char * 16),
        ("flags", CK_ULONG),
        ("numbers", CK_ULONG * 10),
        ("versions", ctypes.c_ubyte * 4),
        ("utc_time", ctypes.c_char * 16),
    )


class Unusable(Exception):
    """What is wrong, and what to do about it."""


class Module:
    """The few calls that making a token takes."""

    def __init__(self, path: str) -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise Unusable(f"{path} cannot be loaded: {error}") from error

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the module; anything but CKR_OK is an error."""
        function = getattr(self._library, name)
        function.restype = CK_ULONG
        if (code := function(*arguments)) != CKR_OK:
            raise Unusable(f"SoftHSM answered {code:#x} to {name}")

    @contextmanager
    def initialised(self) -> Iterator[None]:
        """Between C_Initialize and C_Finalize, which also makes the module read its folder anew."""
        self.call("C_Initialize", None)
        try:
            yield
        finally:
            self.call("C_Finalize", None)

    def tokens(self) -> list[tuple[int, str, int]]:
        """Slot, label and flags of each token; the last one is the blank that SoftHSM always offers."""
        count = CK_ULONG()
        self.call("C_GetSlotList", ctypes.c_ubyte(1), None, ctypes.byref(count))
        slots = (CK_ULONG * count.value)()
        self.call("C_GetSlotList", ctypes.c_ubyte(1), slots, ctypes.byref(count))
        found = []
        for slot in slots[: count.value]:
            info = TokenInfo()
            self.call("C_GetTokenInfo", CK_ULONG(slot), ctypes.byref(info))
            found.append((int(slot), info.label.decode(errors="replace").rstrip(), int(info.flags)))
        return found

    def set_user_pin(self, slot: int, so_pin: bytes, pin: bytes) -> None:
        """Log in as security officer and give the user a PIN."""
        session = CK_ULONG()
        self.call("C_OpenSession", CK_ULONG(slot), CK_ULONG(CKF_RW_SERIAL_SESSION), None, None, ctypes.byref(session))
        self.call("C_Login", session, CK_ULONG(CKU_SO), so_pin, CK_ULONG(len(so_pin)))
        self.call("C_InitPIN", session, pin, CK_ULONG(len(pin)))
        self.call("C_CloseSession", session)


def make_token(module: Module, folder: Path, label: str) -> None:
    """Keep, finish or make the token `label` in `folder`."""
    found = look(module, label, folder)
    if found is not None and found[1] & CKF_USER_PIN_INITIALIZED:
        if not (folder / "pin").is_file():
            raise Unusable(
                f"{folder / 'pin'} is missing and the token in {folder / 'tokens'} cannot be used without it: "
                f"put it back, or remove {folder / 'tokens'} with the keys in it and run this again"
            )
        return
    if found is not None and not (folder / "so-pin").is_file():
        raise Unusable(f"the token in {folder / 'tokens'} was never finished: remove that folder and run this again")
    so_pin, pin = (pin_in(folder / name) for name in ("so-pin", "pin"))
    with module.initialised():
        slot = found[0] if found else module.tokens()[-1][0]
        if found is None:
            padded = label.encode().ljust(LABEL_BYTES)
            module.call("C_InitToken", CK_ULONG(slot), so_pin, CK_ULONG(len(so_pin)), padded)
        module.set_user_pin(slot, so_pin, pin)
    keep(folder / "tokens")


def look(module: Module, label: str, folder: Path) -> tuple[int, int] | None:
    """Slot and flags of the token, None where there is none yet.

    A process that logs in rewrites the token's files, and whoever reads them meanwhile sees a token that is gone or has
    no PIN: so a token on the disk that does not look finished is looked at again before it is believed.
    """
    for delay in (0.05, 0.1, 0.2, 0.3, None):
        with module.initialised():
            tokens = [token for token in module.tokens() if token[2] & CKF_TOKEN_INITIALIZED]
        mine = [(slot, flags) for slot, name, flags in tokens if name == label]
        if len(mine) == 1 and mine[0][1] & CKF_USER_PIN_INITIALIZED:
            return mine[0]
        if not any((folder / "tokens").iterdir()):
            return None
        if delay is not None:
            time.sleep(delay)
    if len(mine) == 1:
        return mine[0]
    names = ", ".join(repr(name) for _, name, _ in tokens) or "nothing that SoftHSM can read"
    raise Unusable(
        f"{folder / 'tokens'} should hold one token {label!r} and holds {names}: name the right label or another "
        f"folder, or, if no key in it is needed, remove {folder / 'tokens'} and run this again"
    )


def pin_in(file: Path) -> bytes:
    """The PIN in a file; a new random one where there is none."""
    try:
        pin = file.read_bytes().strip()
    except FileNotFoundError:
        pin = secrets.token_hex(16).encode()
        write(file, pin)
    if not pin:
        raise Unusable(f"{file} is empty: remove it and run this again")
    return pin


def write(file: Path, content: bytes) -> None:
    """Whole or not at all, mode 0600, on the disk when this returns."""
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def keep(folder: Path) -> None:
    """Sync what is below a folder to the disk, which SoftHSM does not."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def main(module_path: str, directory: str, label: str, template: str) -> None:
    """Make the folder and what is in it, one run at a time."""
    if not 0 < len(label.encode()) <= LABEL_BYTES:
        raise Unusable(f"a label has 1 to {LABEL_BYTES} bytes")
    folder = Path(directory).absolute()
    if "\n" in directory:
        raise Unusable("the name of the folder must be one line")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    with (folder / ".init.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "tokens").mkdir(mode=0o700, exist_ok=True)
        conf = folder / "softhsm2.conf"
        wanted = Path(template).read_text(encoding="utf-8").replace("@TOKENDIR@", str(folder / "tokens")).encode()
        if not conf.is_file() or conf.read_bytes() != wanted:
            write(conf, wanted)
        os.environ["SOFTHSM2_CONF"] = str(conf)
        make_token(Module(module_path), folder, label)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (Unusable, OSError) as error:
        sys.exit(f"init-token: {error}")
