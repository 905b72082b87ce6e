/* The functions of a PKCS#11 v2.40 function list, in its order: PKCS#11 Base Specification, section 5, and 3.4 for types.
 *
 * PLAIN forwards as it is, SESSION looks the session up first, OWN is written out in module.c. The harness reads this
 * table too: a row's number, from 0, is the function's place in the control file.
 */

OWN(C_Initialize, (void *arguments))
OWN(C_Finalize, (void *reserved))
PLAIN(C_GetInfo, (void *info), (info))
OWN(C_GetFunctionList, (struct function_list **list))
PLAIN(C_GetSlotList, (CK_BBOOL present, CK_ULONG *slots, CK_ULONG *count), (present, slots, count))
PLAIN(C_GetSlotInfo, (CK_ULONG slot, void *info), (slot, info))
PLAIN(C_GetTokenInfo, (CK_ULONG slot, void *info), (slot, info))
PLAIN(C_GetMechanismList, (CK_ULONG slot, CK_ULONG *types, CK_ULONG *count), (slot, types, count))
PLAIN(C_GetMechanismInfo, (CK_ULONG slot, CK_ULONG type, void *info), (slot, type, info))
PLAIN(C_InitToken, (CK_ULONG slot, CK_BYTE *pin, CK_ULONG size, CK_BYTE *label), (slot, pin, size, label))
SESSION(C_InitPIN, (CK_ULONG session, CK_BYTE *pin, CK_ULONG size), (REAL, pin, size))
SESSION(C_SetPIN, (CK_ULONG session, CK_BYTE *old, CK_ULONG old_size, CK_BYTE *new, CK_ULONG new_size),
        (REAL, old, old_size, new, new_size))
OWN(C_OpenSession, (CK_ULONG slot, CK_ULONG flags, void *application, CK_NOTIFY notify, CK_ULONG *session))
OWN(C_CloseSession, (CK_ULONG session))
OWN(C_CloseAllSessions, (CK_ULONG slot))
SESSION(C_GetSessionInfo, (CK_ULONG session, void *info), (REAL, info))
SESSION(C_GetOperationState, (CK_ULONG session, CK_BYTE *state, CK_ULONG *size), (REAL, state, size))
SESSION(C_SetOperationState, (CK_ULONG session, CK_BYTE *state, CK_ULONG size, CK_ULONG crypt, CK_ULONG authentication),
        (REAL, state, size, crypt, authentication))
SESSION(C_Login, (CK_ULONG session, CK_ULONG user, CK_BYTE *pin, CK_ULONG size), (REAL, user, pin, size))
SESSION(C_Logout, (CK_ULONG session), (REAL))
SESSION(C_CreateObject, (CK_ULONG session, struct attribute *template, CK_ULONG count, CK_ULONG *object),
        (REAL, template, count, object))
SESSION(C_CopyObject,
        (CK_ULONG session, CK_ULONG object, struct attribute *template, CK_ULONG count, CK_ULONG *copy),
        (REAL, object, template, count, copy))
SESSION(C_DestroyObject, (CK_ULONG session, CK_ULONG object), (REAL, object))
SESSION(C_GetObjectSize, (CK_ULONG session, CK_ULONG object, CK_ULONG *size), (REAL, object, size))
SESSION(C_GetAttributeValue, (CK_ULONG session, CK_ULONG object, struct attribute *template, CK_ULONG count),
        (REAL, object, template, count))
SESSION(C_SetAttributeValue, (CK_ULONG session, CK_ULONG object, struct attribute *template, CK_ULONG count),
        (REAL, object, template, count))
SESSION(C_FindObjectsInit, (CK_ULONG session, struct attribute *template, CK_ULONG count), (REAL, template, count))
SESSION(C_FindObjects, (CK_ULONG session, CK_ULONG *objects, CK_ULONG room, CK_ULONG *count),
        (REAL, objects, room, count))
SESSION(C_FindObjectsFinal, (CK_ULONG session), (REAL))
SESSION(C_EncryptInit, (CK_ULONG session, struct mechanism *mechanism, CK_ULONG key), (REAL, mechanism, key))
SESSION(C_Encrypt, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *out, CK_ULONG *room),
        (REAL, in, size, out, room))
SESSION(C_EncryptUpdate, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *out, CK_ULONG *room),
        (REAL, in, size, out, room))
SESSION(C_EncryptFinal, (CK_ULONG session, CK_BYTE *out, CK_ULONG *room), (REAL, out, room))
SESSION(C_DecryptInit, (CK_ULONG session, struct mechanism *mechanism, CK_ULONG key), (REAL, mechanism, key))
SESSION(C_Decrypt, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *out, CK_ULONG *room),
        (REAL, in, size, out, room))
SESSION(C_DecryptUpdate, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *out, CK_ULONG *room),
        (REAL, in, size, out, room))
SESSION(C_DecryptFinal, (CK_ULONG session, CK_BYTE *out, CK_ULONG *room), (REAL, out, room))
SESSION(C_DigestInit, (CK_ULONG session, struct mechanism *mechanism), (REAL, mechanism))
SESSION(C_Digest, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *out, CK_ULONG *room),
        (REAL, in, size, out, room))
SESSION(C_DigestUpdate, (CK_ULONG session, CK_BYTE *in, CK_ULONG size), (REAL, in, size))
SESSION(C_DigestKey, (CK_ULONG session, CK_ULONG key), (REAL, key))
SESSION(C_DigestFinal, (CK_ULONG session, CK_BYTE *out, CK_ULONG *room), (REAL, out, room))
OWN(C_SignInit, (CK_ULONG session, struct mechanism *mechanism, CK_ULONG key))
OWN(C_Sign, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *signature, CK_ULONG *room))
SESSION(C_SignUpdate, (CK_ULONG session, CK_BYTE *in, CK_ULONG size), (REAL, in, size))
OWN(C_SignFinal, (CK_ULONG session, CK_BYTE *signature, CK_ULONG *room))
SESSION(C_SignRecoverInit, (CK_ULONG session, struct mechanism *mechanism, CK_ULONG key), (REAL, mechanism, key))
SESSION(C_SignRecover, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *signature, CK_ULONG *room),
        (REAL, in, size, signature, room))
SESSION(C_VerifyInit, (CK_ULONG session, struct mechanism *mechanism, CK_ULONG key), (REAL, mechanism, key))
SESSION(C_Verify, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *signature, CK_ULONG length),
        (REAL, in, size, signature, length))
SESSION(C_VerifyUpdate, (CK_ULONG session, CK_BYTE *in, CK_ULONG size), (REAL, in, size))
SESSION(C_VerifyFinal, (CK_ULONG session, CK_BYTE *signature, CK_ULONG length), (REAL, signature, length))
SESSION(C_VerifyRecoverInit, (CK_ULONG session, struct mechanism *mechanism, CK_ULONG key), (REAL, mechanism, key))
SESSION(C_VerifyRecover, (CK_ULONG session, CK_BYTE *signature, CK_ULONG size, CK_BYTE *out, CK_ULONG *room),
        (REAL, signature, size, out, room))
SESSION(C_DigestEncryptUpdate, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *out, CK_ULONG *room),
        (REAL, in, size, out, room))
SESSION(C_DecryptDigestUpdate, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *out, CK_ULONG *room),
        (REAL, in, size, out, room))
SESSION(C_SignEncryptUpdate, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *out, CK_ULONG *room),
        (REAL, in, size, out, room))
SESSION(C_DecryptVerifyUpdate, (CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *out, CK_ULONG *room),
        (REAL, in, size, out, room))
SESSION(C_GenerateKey,
        (CK_ULONG session, struct mechanism *mechanism, struct attribute *template, CK_ULONG count, CK_ULONG *key),
        (REAL, mechanism, template, count, key))
SESSION(C_GenerateKeyPair,
        (CK_ULONG session, struct mechanism *mechanism, struct attribute *public, CK_ULONG public_count,
         struct attribute *private, CK_ULONG private_count, CK_ULONG *public_key, CK_ULONG *private_key),
        (REAL, mechanism, public, public_count, private, private_count, public_key, private_key))
SESSION(C_WrapKey,
        (CK_ULONG session, struct mechanism *mechanism, CK_ULONG wrapping, CK_ULONG key, CK_BYTE *out, CK_ULONG *room),
        (REAL, mechanism, wrapping, key, out, room))
SESSION(C_UnwrapKey,
        (CK_ULONG session, struct mechanism *mechanism, CK_ULONG wrapping, CK_BYTE *in, CK_ULONG size,
         struct attribute *template, CK_ULONG count, CK_ULONG *key),
        (REAL, mechanism, wrapping, in, size, template, count, key))
SESSION(C_DeriveKey,
        (CK_ULONG session, struct mechanism *mechanism, CK_ULONG base, struct attribute *template, CK_ULONG count,
         CK_ULONG *key),
        (REAL, mechanism, base, template, count, key))
SESSION(C_SeedRandom, (CK_ULONG session, CK_BYTE *seed, CK_ULONG size), (REAL, seed, size))
SESSION(C_GenerateRandom, (CK_ULONG session, CK_BYTE *out, CK_ULONG size), (REAL, out, size))
SESSION(C_GetFunctionStatus, (CK_ULONG session), (REAL))
SESSION(C_CancelFunction, (CK_ULONG session), (REAL))
PLAIN(C_WaitForSlotEvent, (CK_ULONG flags, CK_ULONG *slot, void *reserved), (flags, slot, reserved))
