"""What a module's return value means for us: one table, and the way from a vendor's error to one of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final

import pkcs11
from pkcs11 import PKCS11Error

from kms_jwks import errors


class Meaning(Enum):
    """What happened, as far as it decides what is done next."""

    SESSION = "this session is lost; others may live"
    HANDLE = "this object handle is stale; the key may be there"
    LOST = "token, login or module is lost; all has to be opened anew"
    DOUBTFUL = "it failed and does not say why; SoftHSM answers so while another process rewrites the token"
    UNSUPPORTED = "the module cannot do this"
    REFUSED = "the module will not do this, however often it is asked"


MEANINGS: Final[Mapping[type[PKCS11Error], Meaning]] = MappingProxyType(
    {
        pkcs11.SessionClosed: Meaning.SESSION,
        pkcs11.SessionHandleInvalid: Meaning.SESSION,
        # An operation of an earlier call is in the way, or this one's vanished: a new session has neither.
        pkcs11.OperationActive: Meaning.SESSION,
        pkcs11.OperationNotInitialized: Meaning.SESSION,
        pkcs11.FunctionCancelled: Meaning.SESSION,
        pkcs11.ObjectHandleInvalid: Meaning.HANDLE,
        pkcs11.KeyHandleInvalid: Meaning.HANDLE,
        pkcs11.UserNotLoggedIn: Meaning.LOST,
        pkcs11.TokenNotPresent: Meaning.LOST,
        pkcs11.TokenNotRecognised: Meaning.LOST,
        pkcs11.NoSuchToken: Meaning.LOST,
        pkcs11.SlotIDInvalid: Meaning.LOST,
        pkcs11.DeviceRemoved: Meaning.LOST,
        pkcs11.DeviceError: Meaning.LOST,
        pkcs11.GeneralError: Meaning.DOUBTFUL,
        pkcs11.FunctionFailed: Meaning.DOUBTFUL,
        pkcs11.HostMemory: Meaning.DOUBTFUL,
        pkcs11.DeviceMemory: Meaning.DOUBTFUL,
        pkcs11.SessionCount: Meaning.DOUBTFUL,
        # None of these is true when SoftHSM says it at start-up (C_Login rewrites the file others read).
        pkcs11.UserPinNotInitialized: Meaning.DOUBTFUL,
        pkcs11.MechanismInvalid: Meaning.UNSUPPORTED,
        pkcs11.MechanismParamInvalid: Meaning.UNSUPPORTED,
        pkcs11.FunctionNotSupported: Meaning.UNSUPPORTED,
        pkcs11.KeySizeRange: Meaning.UNSUPPORTED,
        pkcs11.DomainParamsInvalid: Meaning.UNSUPPORTED,
        pkcs11.AttributeValueInvalid: Meaning.UNSUPPORTED,
    }
)
"""By python-pkcs11's class. A class that is not here is REFUSED: asking again would change nothing."""

_PLAIN: Final[Mapping[str, Meaning]] = MappingProxyType(
    {
        "Initialisation error (not initialized). Should never see this.": Meaning.LOST,
        "Unmapped error code 0x68": Meaning.REFUSED,  # CKR_KEY_FUNCTION_NOT_PERMITTED
        "Unmapped error code 0x140": Meaning.UNSUPPORTED,  # CKR_CURVE_NOT_SUPPORTED
        "Unmapped error code 0x1b": Meaning.REFUSED,  # CKR_ACTION_PROHIBITED
    }
)
"""By text, for return values that python-pkcs11 has no class for; others are DOUBTFUL."""


def meaning_of(error: PKCS11Error) -> Meaning:
    """The row of an error."""
    if type(error) is PKCS11Error:
        return _PLAIN.get(str(error), Meaning.DOUBTFUL)
    return MEANINGS.get(type(error), Meaning.REFUSED)


def said(error: BaseException) -> str:
    """What the module answered, for messages: the name of the return value, never its arguments."""
    return str(error) if type(error) is PKCS11Error else type(error).__name__


def translated(error: PKCS11Error, doing: str) -> errors.BackendError:
    """Our error for an answer of the module that is final: nothing more is going to be tried in this call."""
    match meaning_of(error):
        case Meaning.UNSUPPORTED:
            return errors.UnsupportedAlgorithm(f"The module answered {said(error)} to {doing}.")
        case Meaning.REFUSED:
            return errors.BackendRefused(f"The module answered {said(error)} to {doing}.")
        case _:
            return unavailable(f"The module answered {said(error)} to {doing}.")


def unavailable(detail: str, seconds: float = 1.0) -> errors.BackendUnavailable:
    """BackendUnavailable that asks the caller to wait, in whole seconds and at least one."""
    return errors.BackendUnavailable(detail, retry_after=max(1, math.ceil(seconds)))


class Lost(Exception):
    """The connection is no good any more; open a new one. Never leaves the package."""
