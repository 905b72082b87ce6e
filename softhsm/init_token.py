"""Makes a SoftHSM token for local use and prints the path of SoftHSM's PKCS#11 module.

    init-token DIR [LABEL]
    init-token --module      only prints the path, or fails where SoftHSM is not installed

DIR (mode 0700) then holds softhsm2.conf, tokens/, pin and so-pin (0600). An existing token is kept; one that an
interrupted run began is completed. SOFTHSM2_MODULE names the module where this script does not find it.

The calls go to the module through ctypes, with the standard library alone: `softhsm2-util --pin` would show the PINs in
the list of processes. Here they stay in this process and in their two files.
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
TEMPLATE = Path(__file__).with_name("softhsm2.conf.in")
MODULES = (
    "usr/lib/softhsm/libsofthsm2.so",
    "usr/lib/*-linux-gnu*/softhsm/libsofthsm2.so",
    "usr/lib64/pkcs11/libsofthsm2.so",
    "usr/lib64/softhsm/libsofthsm2.so",
    "usr/lib/pkcs11/libsofthsm2.so",
    "usr/local/lib/softhsm/libsofthsm2.so",
)
"""Where distributions put the module, below /."""


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
    """The message says what is wrong and what to do about it."""


class Module:
    """SoftHSM's module, with the calls that making a token needs."""

    def __init__(self, path: str) -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise Unusable(f"{path} cannot be loaded: {error}") from error

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the module. Raises Unusable for any result but CKR_OK."""
        function = getattr(self._library, name)
        function.restype = CK_ULONG
        if (code := function(*arguments)) != CKR_OK:
            raise Unusable(f"SoftHSM answered {code:#x} to {name}")

    @contextmanager
    def initialised(self) -> Iterator[None]:
        """Run between C_Initialize and C_Finalize; each time the module reads its folder again."""
        self.call("C_Initialize", None)
        try:
            yield
        finally:
            self.call("C_Finalize", None)

    def tokens(self) -> list[tuple[int, str, int]]:
        """Slot, label and flags of each token; the last one is the blank token that SoftHSM always offers."""
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
    """Make the token `label` in `folder`; keep a complete one, and complete one that an earlier run began."""
    found = find_token(module, label, folder)
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
    sync(folder / "tokens")


def find_token(module: Module, label: str, folder: Path) -> tuple[int, int] | None:
    """Slot and flags of the token; None where there is none yet.

    A process that logs in rewrites the token's files. A process that reads them meanwhile finds no token, or one
    without a PIN. So a token on the disk that seems incomplete is read again, up to four times.
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
    """The PIN in a file; without the file a new random PIN, which is written there."""
    try:
        pin = file.read_bytes().strip()
    except FileNotFoundError:
        pin = secrets.token_hex(16).encode()
        write(file, pin)
    if not pin:
        raise Unusable(f"{file} is empty: remove it and run this again")
    return pin


def write(file: Path, content: bytes) -> None:
    """Write a file atomically, with mode 0600; it is on the disk when this returns."""
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def sync(folder: Path) -> None:
    """Sync a folder and its files to the disk, which SoftHSM does not do."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def find_module() -> str:
    """The path of SoftHSM's module: SOFTHSM2_MODULE, else the first place that holds one. Raises Unusable."""
    if named := os.environ.get("SOFTHSM2_MODULE"):
        if not Path(named).is_file():
            raise Unusable(f"SOFTHSM2_MODULE={named} is no file")
        return named
    for pattern in MODULES:
        for path in sorted(Path("/").glob(pattern)):
            return str(path)
    raise Unusable(
        "SoftHSM's module (libsofthsm2.so) is not installed: apt-get install softhsm2, or set SOFTHSM2_MODULE"
    )


def prepare(directory: str, label: str) -> str:
    """Make the folder, its files and the token; return the module's path. A lock lets one run at a time do so."""
    if not 0 < len(label.encode()) <= LABEL_BYTES:
        raise Unusable(f"a label has 1 to {LABEL_BYTES} bytes")
    if "\n" in directory:
        raise Unusable("the name of the folder must be one line")
    module = find_module()
    folder = Path(directory).absolute()
    os.umask(0o077)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    with (folder / ".init.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "tokens").mkdir(mode=0o700, exist_ok=True)
        conf = folder / "softhsm2.conf"
        wanted = TEMPLATE.read_text(encoding="utf-8").replace("@TOKENDIR@", str(folder / "tokens")).encode()
        if not conf.is_file() or conf.read_bytes() != wanted:
            write(conf, wanted)
        os.environ["SOFTHSM2_CONF"] = str(conf)
        make_token(Module(module), folder, label)
    return module


def main(arguments: list[str]) -> None:
    """Do what the arguments say, and print the module's path."""
    if arguments == ["--module"]:
        print(find_module())
        return
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        sys.exit(2)
    print(prepare(arguments[0], arguments[1] if arguments[1:] else "kms-jwks"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Unusable, OSError) as error:
        sys.exit(f"init-token: {error}")
