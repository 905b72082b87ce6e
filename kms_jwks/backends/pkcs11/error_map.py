"""The return values of PKCS#11 in one table, and their translation into the errors of the backend contract.

`Meaning` has a row for each class of return values: whether the call is repeated, what is rebuilt before, and as which
error it ends where that does not help. `CODES` has a row for each return value of PKCS#11 v3.2. opening.py judges the
answers of C_Login by the same table, and more strictly: see there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

import pkcs11
from pkcs11 import PKCS11Error

from kms_jwks import errors
from kms_jwks.errors import BackendError, BackendRefused, BackendUnavailable, UnsupportedAlgorithm


class Rebuilt(Enum):
    """What is discarded and made anew before a call is repeated; each row includes those before it."""

    NOTHING = 0
    HANDLES = 1
    """The object handles that were found in a session."""
    SESSION = 2
    CONNECTION = 3
    """All sessions of the process with the token, and its login."""
    MODULE = 4
    """C_Finalize and C_Initialize."""


class Meaning(Enum):
    """What a return value says, as far as the next step depends on it."""

    def __init__(self, words: str, rebuilt: Rebuilt, ends_as: type[BackendError]) -> None:
        self.words = words
        self.rebuilt = rebuilt
        self.ends_as = ends_as

    HANDLE = "this object handle is stale; the key may be there", Rebuilt.HANDLES, BackendUnavailable
    SESSION = "this session is lost; other sessions may work", Rebuilt.SESSION, BackendUnavailable
    DOUBTFUL = (
        "it failed and does not say why; SoftHSM answers so while another process rewrites the token",
        Rebuilt.SESSION,  # and the connection, where the token fails the health check
        BackendUnavailable,
    )
    LOST = "token or login is lost; the token has to be opened anew", Rebuilt.CONNECTION, BackendUnavailable
    MODULE = "the module has to be initialised anew", Rebuilt.MODULE, BackendUnavailable
    PIN = "the PIN is refused; it is never tried again while its source is unchanged", Rebuilt.NOTHING, BackendRefused
    ABSENT = "this object has no such attribute, or does not show it", Rebuilt.NOTHING, BackendRefused
    UNSUPPORTED = "the module cannot do this", Rebuilt.NOTHING, UnsupportedAlgorithm
    REFUSED = "the module refuses this, however often it is asked", Rebuilt.NOTHING, BackendRefused

    @property
    def is_final(self) -> bool:
        """Whether repeating the call would change nothing."""
        return self.rebuilt is Rebuilt.NOTHING


@dataclass(frozen=True, slots=True)
class Code:
    """One return value: its name in the specification, its meaning, and python-pkcs11's class where it has one."""

    name: str
    meaning: Meaning
    vendor: type[PKCS11Error] | None = None


_M = Meaning
CODES: Final[Mapping[int, Code]] = MappingProxyType(
    {
        0x01: Code("CKR_CANCEL", _M.SESSION),
        0x02: Code("CKR_HOST_MEMORY", _M.DOUBTFUL, pkcs11.HostMemory),
        0x03: Code("CKR_SLOT_ID_INVALID", _M.LOST, pkcs11.SlotIDInvalid),
        0x05: Code("CKR_GENERAL_ERROR", _M.DOUBTFUL, pkcs11.GeneralError),
        0x06: Code("CKR_FUNCTION_FAILED", _M.DOUBTFUL, pkcs11.FunctionFailed),
        0x07: Code("CKR_ARGUMENTS_BAD", _M.REFUSED, pkcs11.ArgumentsBad),
        0x08: Code("CKR_NO_EVENT", _M.DOUBTFUL, pkcs11.NoEvent),
        0x09: Code("CKR_NEED_TO_CREATE_THREADS", _M.REFUSED),
        0x0A: Code("CKR_CANT_LOCK", _M.REFUSED),  # expected of C_Initialize: see module.py
        0x10: Code("CKR_ATTRIBUTE_READ_ONLY", _M.REFUSED, pkcs11.AttributeReadOnly),
        0x11: Code("CKR_ATTRIBUTE_SENSITIVE", _M.ABSENT, pkcs11.AttributeSensitive),
        0x12: Code("CKR_ATTRIBUTE_TYPE_INVALID", _M.ABSENT, pkcs11.AttributeTypeInvalid),
        0x13: Code("CKR_ATTRIBUTE_VALUE_INVALID", _M.UNSUPPORTED, pkcs11.AttributeValueInvalid),
        0x1B: Code("CKR_ACTION_PROHIBITED", _M.REFUSED),
        0x20: Code("CKR_DATA_INVALID", _M.REFUSED, pkcs11.DataInvalid),
        0x21: Code("CKR_DATA_LEN_RANGE", _M.REFUSED, pkcs11.DataLenRange),
        0x30: Code("CKR_DEVICE_ERROR", _M.LOST, pkcs11.DeviceError),
        0x31: Code("CKR_DEVICE_MEMORY", _M.DOUBTFUL, pkcs11.DeviceMemory),
        0x32: Code("CKR_DEVICE_REMOVED", _M.LOST, pkcs11.DeviceRemoved),
        0x40: Code("CKR_ENCRYPTED_DATA_INVALID", _M.REFUSED, pkcs11.EncryptedDataInvalid),
        0x41: Code("CKR_ENCRYPTED_DATA_LEN_RANGE", _M.REFUSED, pkcs11.EncryptedDataLenRange),
        0x42: Code("CKR_AEAD_DECRYPT_FAILED", _M.REFUSED),
        0x50: Code("CKR_FUNCTION_CANCELED", _M.SESSION, pkcs11.FunctionCancelled),
        0x51: Code("CKR_FUNCTION_NOT_PARALLEL", _M.SESSION),
        0x54: Code("CKR_FUNCTION_NOT_SUPPORTED", _M.UNSUPPORTED, pkcs11.FunctionNotSupported),
        0x60: Code("CKR_KEY_HANDLE_INVALID", _M.HANDLE, pkcs11.KeyHandleInvalid),
        0x62: Code("CKR_KEY_SIZE_RANGE", _M.UNSUPPORTED, pkcs11.KeySizeRange),
        0x63: Code("CKR_KEY_TYPE_INCONSISTENT", _M.REFUSED, pkcs11.KeyTypeInconsistent),
        0x64: Code("CKR_KEY_NOT_NEEDED", _M.REFUSED, pkcs11.KeyNotNeeded),
        0x65: Code("CKR_KEY_CHANGED", _M.HANDLE),
        0x66: Code("CKR_KEY_NEEDED", _M.REFUSED, pkcs11.KeyNeeded),
        0x67: Code("CKR_KEY_INDIGESTIBLE", _M.REFUSED, pkcs11.KeyIndigestible),
        0x68: Code("CKR_KEY_FUNCTION_NOT_PERMITTED", _M.REFUSED),
        0x69: Code("CKR_KEY_NOT_WRAPPABLE", _M.REFUSED, pkcs11.KeyNotWrappable),
        0x6A: Code("CKR_KEY_UNEXTRACTABLE", _M.REFUSED, pkcs11.KeyUnextractable),
        0x70: Code("CKR_MECHANISM_INVALID", _M.UNSUPPORTED, pkcs11.MechanismInvalid),
        0x71: Code("CKR_MECHANISM_PARAM_INVALID", _M.UNSUPPORTED, pkcs11.MechanismParamInvalid),
        0x82: Code("CKR_OBJECT_HANDLE_INVALID", _M.HANDLE, pkcs11.ObjectHandleInvalid),
        # An operation of an earlier call is in the way, or this one's vanished: a new session has neither.
        0x90: Code("CKR_OPERATION_ACTIVE", _M.SESSION, pkcs11.OperationActive),
        0x91: Code("CKR_OPERATION_NOT_INITIALIZED", _M.SESSION, pkcs11.OperationNotInitialized),
        0xA0: Code("CKR_PIN_INCORRECT", _M.PIN, pkcs11.PinIncorrect),
        0xA1: Code("CKR_PIN_INVALID", _M.PIN, pkcs11.PinInvalid),
        0xA2: Code("CKR_PIN_LEN_RANGE", _M.PIN, pkcs11.PinLenRange),
        0xA3: Code("CKR_PIN_EXPIRED", _M.PIN, pkcs11.PinExpired),
        0xA4: Code("CKR_PIN_LOCKED", _M.PIN, pkcs11.PinLocked),
        0xB0: Code("CKR_SESSION_CLOSED", _M.SESSION, pkcs11.SessionClosed),
        0xB1: Code("CKR_SESSION_COUNT", _M.DOUBTFUL, pkcs11.SessionCount),
        0xB3: Code("CKR_SESSION_HANDLE_INVALID", _M.SESSION, pkcs11.SessionHandleInvalid),
        0xB4: Code("CKR_SESSION_PARALLEL_NOT_SUPPORTED", _M.REFUSED),
        0xB5: Code("CKR_SESSION_READ_ONLY", _M.REFUSED, pkcs11.SessionReadOnly),
        0xB6: Code("CKR_SESSION_EXISTS", _M.REFUSED, pkcs11.SessionExists),
        0xB7: Code("CKR_SESSION_READ_ONLY_EXISTS", _M.REFUSED, pkcs11.SessionReadOnlyExists),
        0xB8: Code("CKR_SESSION_READ_WRITE_SO_EXISTS", _M.DOUBTFUL, pkcs11.SessionReadWriteSOExists),
        0xC0: Code("CKR_SIGNATURE_INVALID", _M.REFUSED, pkcs11.SignatureInvalid),
        0xC1: Code("CKR_SIGNATURE_LEN_RANGE", _M.REFUSED, pkcs11.SignatureLenRange),
        0xD0: Code("CKR_TEMPLATE_INCOMPLETE", _M.REFUSED, pkcs11.TemplateIncomplete),
        0xD1: Code("CKR_TEMPLATE_INCONSISTENT", _M.REFUSED, pkcs11.TemplateInconsistent),
        0xE0: Code("CKR_TOKEN_NOT_PRESENT", _M.LOST, pkcs11.TokenNotPresent),
        0xE1: Code("CKR_TOKEN_NOT_RECOGNIZED", _M.LOST, pkcs11.TokenNotRecognised),
        0xE2: Code("CKR_TOKEN_WRITE_PROTECTED", _M.REFUSED, pkcs11.TokenWriteProtected),
        0xF0: Code("CKR_UNWRAPPING_KEY_HANDLE_INVALID", _M.REFUSED, pkcs11.UnwrappingKeyHandleInvalid),
        0xF1: Code("CKR_UNWRAPPING_KEY_SIZE_RANGE", _M.REFUSED, pkcs11.UnwrappingKeySizeRange),
        0xF2: Code("CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT", _M.REFUSED, pkcs11.UnwrappingKeyTypeInconsistent),
        0x100: Code("CKR_USER_ALREADY_LOGGED_IN", _M.DOUBTFUL, pkcs11.UserAlreadyLoggedIn),
        0x101: Code("CKR_USER_NOT_LOGGED_IN", _M.LOST, pkcs11.UserNotLoggedIn),
        # Not true when SoftHSM says it at start-up (C_Login rewrites the file that others read).
        0x102: Code("CKR_USER_PIN_NOT_INITIALIZED", _M.DOUBTFUL, pkcs11.UserPinNotInitialized),
        0x103: Code("CKR_USER_TYPE_INVALID", _M.REFUSED),
        0x104: Code("CKR_USER_ANOTHER_ALREADY_LOGGED_IN", _M.DOUBTFUL, pkcs11.AnotherUserAlreadyLoggedIn),
        0x105: Code("CKR_USER_TOO_MANY_TYPES", _M.DOUBTFUL, pkcs11.UserTooManyTypes),
        0x110: Code("CKR_WRAPPED_KEY_INVALID", _M.REFUSED, pkcs11.WrappedKeyInvalid),
        0x112: Code("CKR_WRAPPED_KEY_LEN_RANGE", _M.REFUSED, pkcs11.WrappedKeyLenRange),
        0x113: Code("CKR_WRAPPING_KEY_HANDLE_INVALID", _M.REFUSED, pkcs11.WrappingKeyHandleInvalid),
        0x114: Code("CKR_WRAPPING_KEY_SIZE_RANGE", _M.REFUSED, pkcs11.WrappingKeySizeRange),
        0x115: Code("CKR_WRAPPING_KEY_TYPE_INCONSISTENT", _M.REFUSED, pkcs11.WrappingKeyTypeInconsistent),
        0x120: Code("CKR_RANDOM_SEED_NOT_SUPPORTED", _M.REFUSED, pkcs11.RandomSeedNotSupported),
        0x121: Code("CKR_RANDOM_NO_RNG", _M.REFUSED, pkcs11.RandomNoRNG),
        0x130: Code("CKR_DOMAIN_PARAMS_INVALID", _M.UNSUPPORTED, pkcs11.DomainParamsInvalid),
        0x140: Code("CKR_CURVE_NOT_SUPPORTED", _M.UNSUPPORTED),
        # Also what python-pkcs11 sees of an attribute when the call that asked for its length failed.
        0x150: Code("CKR_BUFFER_TOO_SMALL", _M.DOUBTFUL),
        0x160: Code("CKR_SAVED_STATE_INVALID", _M.REFUSED),
        0x170: Code("CKR_INFORMATION_SENSITIVE", _M.REFUSED),
        0x180: Code("CKR_STATE_UNSAVEABLE", _M.REFUSED),
        0x190: Code("CKR_CRYPTOKI_NOT_INITIALIZED", _M.MODULE),
        0x191: Code("CKR_CRYPTOKI_ALREADY_INITIALIZED", _M.DOUBTFUL),
        0x1A0: Code("CKR_MUTEX_BAD", _M.MODULE),
        0x1A1: Code("CKR_MUTEX_NOT_LOCKED", _M.MODULE),
        0x1B0: Code("CKR_NEW_PIN_MODE", _M.PIN),
        0x1B1: Code("CKR_NEXT_OTP", _M.PIN),
        0x1B5: Code("CKR_EXCEEDED_MAX_ITERATIONS", _M.DOUBTFUL, pkcs11.ExceededMaxIterations),
        0x1B6: Code("CKR_FIPS_SELF_TEST_FAILED", _M.MODULE),
        0x1B7: Code("CKR_LIBRARY_LOAD_FAILED", _M.MODULE),
        0x1B8: Code("CKR_PIN_TOO_WEAK", _M.PIN, pkcs11.PinTooWeak),
        0x1B9: Code("CKR_PUBLIC_KEY_INVALID", _M.REFUSED, pkcs11.PublicKeyInvalid),
        0x200: Code("CKR_FUNCTION_REJECTED", _M.REFUSED, pkcs11.FunctionRejected),
        0x201: Code("CKR_TOKEN_RESOURCE_EXCEEDED", _M.DOUBTFUL),
        0x202: Code("CKR_OPERATION_CANCEL_FAILED", _M.SESSION),
        0x203: Code("CKR_KEY_EXHAUSTED", _M.REFUSED),
        0x204: Code("CKR_PENDING", _M.SESSION),
        0x205: Code("CKR_SESSION_ASYNC_NOT_SUPPORTED", _M.REFUSED),
        0x206: Code("CKR_SEED_RANDOM_REQUIRED", _M.REFUSED),
        0x207: Code("CKR_OPERATION_NOT_VALIDATED", _M.REFUSED),
        0x208: Code("CKR_TOKEN_NOT_INITIALIZED", _M.LOST),
        0x209: Code("CKR_PARAMETER_SET_NOT_SUPPORTED", _M.UNSUPPORTED),
    }
)
"""By number. A return value that has no row is a vendor's own or a later version's, and counts as DOUBTFUL."""

_BY_CLASS: Final = {row.vendor: code for code, row in CODES.items() if row.vendor is not None}
_BY_TEXT: Final = {
    "Buffer was too small. Should never see this.": 0x150,
    "Parallel not supported. Should never see this.": 0xB4,
    "User type invalid. Should never see this.": 0x103,
    "Initialisation error (not initialized). Should never see this.": 0x190,
    "Initialisation error (already initialized). Should never see this.": 0x191,
}
_UNMAPPED: Final = re.compile("Unmapped error code 0x([0-9a-f]+)")


def code_of(error: PKCS11Error) -> int | None:
    """The return value behind an exception of python-pkcs11; None for the exceptions it raises by itself."""
    known = _BY_CLASS.get(type(error), _BY_TEXT.get(str(error)))
    unmapped = _UNMAPPED.fullmatch(str(error))
    return int(unmapped[1], 16) if known is None and unmapped else known


def meaning_of(error: PKCS11Error | int) -> Meaning:
    """The meaning of an exception, or of a return value other than CKR_OK."""
    code = error if isinstance(error, int) else code_of(error)
    row = CODES.get(code) if code is not None else None
    return Meaning.DOUBTFUL if row is None else row.meaning


def name_of(code: int) -> str:
    """The name of a return value for messages; the number of one that the specification does not have."""
    return CODES[code].name if code in CODES else f"{code:#x}"


def describe_error(error: BaseException) -> str:
    """What the module answered, for messages: the name of the return value, never its arguments."""
    if isinstance(error, InvalidAnswer):
        return str(error)
    code = code_of(error) if isinstance(error, PKCS11Error) else None
    return type(error).__name__ if code is None else name_of(code)


def translate(error: PKCS11Error, doing: str) -> errors.BackendError:
    """The error of the backend contract for an answer of the module after which the call is not repeated."""
    detail = f"The module answered {describe_error(error)} to {doing}."
    kind = meaning_of(error).ends_as
    return unavailable(detail) if kind is BackendUnavailable else kind(detail)


def unavailable(detail: str, seconds: float = 1.0, *, next_step: str | None = None) -> errors.BackendUnavailable:
    """BackendUnavailable that asks the caller to wait, in whole seconds and at least one."""
    return BackendUnavailable(detail, retry_after=max(1, math.ceil(seconds)), next_step=next_step)


class ConnectionLost(Exception):
    """The connection does not work any more and has to be opened anew. Never leaves the package."""


class InvalidAnswer(Exception):
    """The module answered CKR_OK, and the result cannot be what was asked for. Never leaves the package."""
