/* A PKCS#11 module that forwards every call to a real one and fails as the control file beside it says.
 *
 * The file `<this module>.control` is mapped into every process that loads the module; tests write faults into it and
 * read counts from it (harness.py knows the same layout by name). Session handles are this module's own, so that it can lose
 * them; it also counts what no caller may do: see `VIOLATIONS` below.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* --- Cryptoki, as far as it is needed (PKCS#11 Base Specification v2.40) ------------------------------------------ */

typedef unsigned char CK_BYTE;
typedef unsigned char CK_BBOOL;
typedef unsigned long CK_ULONG;
typedef CK_ULONG (*CK_NOTIFY)(CK_ULONG session, CK_ULONG event, void *application);

#define CKR_OK 0x0UL
#define CKR_GENERAL_ERROR 0x5UL
#define CKR_SESSION_COUNT 0xB1UL
#define CKR_SESSION_HANDLE_INVALID 0xB3UL
#define CKA_ID 0x102UL

struct attribute {
    CK_ULONG type;
    void *value;
    CK_ULONG size;
};

struct mechanism {
    CK_ULONG type;
    void *parameter;
    CK_ULONG size;
};

enum function {
#define PLAIN(name, declaration, arguments) AT_##name,
#define SESSION PLAIN
#define OWN(name, declaration) AT_##name,
#include "functions.h"
#undef PLAIN
#undef SESSION
#undef OWN
    FUNCTIONS
};

struct function_list {
    unsigned char version[2];
    void (*functions[FUNCTIONS])(void);
};

#define PLAIN(name, declaration, arguments) static CK_ULONG do_##name declaration;
#define SESSION PLAIN
#define OWN(name, declaration) static CK_ULONG do_##name declaration;
#include "functions.h"
#undef PLAIN
#undef SESSION
#undef OWN

static struct function_list ours = {
    {2, 40},
    {
#define PLAIN(name, declaration, arguments) (void (*)(void))do_##name,
#define SESSION PLAIN
#define OWN(name, declaration) (void (*)(void))do_##name,
#include "functions.h"
#undef PLAIN
#undef SESSION
#undef OWN
    }};

/* --- the control file --------------------------------------------------------------------------------------------- */

enum action { NOTHING, ANSWER, HANG, TRUNCATE, FLIP, CRASH };
enum { KEY_BYTES = 64, PATH_BYTES = 1024, PROCESSES = 64 };

struct fault {
    uint64_t armed; /* 0: no fault; changes with each one that is set */
    uint64_t action;
    uint64_t value;             /* the return value, milliseconds (0: until it is cleared), bytes, or the bit */
    uint64_t first, last, every; /* of the calls since it was set, counted from 1 */
    uint64_t late;              /* after the real module did its work */
    uint64_t pid;               /* 0: every process */
    uint64_t mechanism;         /* of the signature; all ones: every mechanism */
    uint64_t key_size;          /* 0: every key, else the CKA_ID of the one that signs */
    unsigned char key[KEY_BYTES];
};

struct slot {
    uint64_t calls;
    uint64_t succeeded;
    uint64_t seen;    /* calls since the fault was set, of those it is meant for */
    uint64_t acted;   /* how often it has acted */
    uint64_t hanging; /* calls that hang now */
    struct fault fault;
};

struct process {
    uint64_t pid;
    uint64_t open;
};

struct control {
    uint64_t ready; /* the size of this struct */
    uint64_t opened, closed;
    uint64_t losses; /* how often all sessions were lost */
    /* VIOLATIONS */
    uint64_t finalised_under_calls;
    uint64_t calls_without_locking; /* two threads inside after an initialisation without locking */
    uint64_t sessions_shared;       /* two threads inside with one session */
    char real[PATH_BYTES];
    struct process processes[PROCESSES];
    struct slot slots[FUNCTIONS];
};

static struct control *control;
static const struct function_list *real;
static pthread_once_t loading = PTHREAD_ONCE_INIT;

static void add(uint64_t *number, int64_t by) { __atomic_fetch_add(number, (uint64_t)by, __ATOMIC_SEQ_CST); }
static uint64_t load(const uint64_t *number) { return __atomic_load_n(number, __ATOMIC_SEQ_CST); }

/* --- sessions ----------------------------------------------------------------------------------------------------- */

enum { SESSIONS_BITS = 12, SESSIONS = 1 << SESSIONS_BITS };

struct session {
    CK_ULONG handle; /* 0: free */
    CK_ULONG real;
    CK_ULONG slot;
    unsigned inside;
    bool gone; /* lost; closed in the real module when no call is inside */
    CK_ULONG mechanism;
    size_t key_size;
    unsigned char key[KEY_BYTES];
};

static pthread_mutex_t table = PTHREAD_MUTEX_INITIALIZER;
static struct session sessions[SESSIONS];
static CK_ULONG serial;
static uint64_t losses_seen;
static struct process *mine;
static uint64_t inside;
static bool locking;

static void count_sessions(int by)
{
    if (by > 0)
        add(&control->opened, by);
    else
        add(&control->closed, -by);
    if (mine == NULL) {
        uint64_t pid = (uint64_t)getpid();
        for (int i = 0; i < PROCESSES && mine == NULL; i++) {
            uint64_t holder = load(&control->processes[i].pid);
            if (holder == pid || (holder && kill((pid_t)holder, 0) == 0))
                continue;
            if (__atomic_compare_exchange_n(&control->processes[i].pid, &holder, pid, false, __ATOMIC_SEQ_CST,
                                            __ATOMIC_SEQ_CST)) {
                mine = &control->processes[i];
                __atomic_store_n(&mine->open, 0, __ATOMIC_SEQ_CST);
            }
        }
    }
    if (mine != NULL)
        add(&mine->open, by);
}

/* A child of a fork has no sessions of its own. */
static void forked(void)
{
    pthread_mutex_init(&table, NULL);
    memset(sessions, 0, sizeof sessions);
    mine = NULL;
    inside = 0;
}

#define FORWARD(name) ((__typeof__(&do_##name))real->functions[AT_##name])

static void free_session(struct session *session)
{
    FORWARD(C_CloseSession)(session->real);
    session->handle = 0;
}

/* With the table locked. */
static void drop(struct session *session)
{
    session->gone = true;
    count_sessions(-1);
}

static void lose_sessions(void)
{
    uint64_t now = load(&control->losses);
    if (now == losses_seen)
        return;
    losses_seen = now;
    for (int i = 0; i < SESSIONS; i++) {
        if (!sessions[i].handle || sessions[i].gone)
            continue;
        drop(&sessions[i]);
        if (!sessions[i].inside)
            free_session(&sessions[i]);
    }
}

static CK_ULONG remember_session(CK_ULONG handle, CK_ULONG slot)
{
    CK_ULONG found = 0;
    pthread_mutex_lock(&table);
    for (CK_ULONG i = 0; i < SESSIONS && !found; i++) {
        if (sessions[i].handle)
            continue;
        found = ++serial << SESSIONS_BITS | i;
        sessions[i] = (struct session){.handle = found, .real = handle, .slot = slot};
        count_sessions(1);
    }
    pthread_mutex_unlock(&table);
    return found;
}

/* Those of a slot, or all where it is NULL: the real module has closed them. */
static void forget_sessions(const CK_ULONG *slot)
{
    pthread_mutex_lock(&table);
    for (int i = 0; i < SESSIONS; i++) {
        if (!sessions[i].handle || (slot && sessions[i].slot != *slot))
            continue;
        if (!sessions[i].gone)
            drop(&sessions[i]);
        if (!sessions[i].inside)
            sessions[i].handle = 0;
    }
    pthread_mutex_unlock(&table);
}

/* --- one call ----------------------------------------------------------------------------------------------------- */

struct call {
    enum function function;
    struct session *session;
    CK_ULONG real; /* the session's handle in the real module */
    struct fault fault;
    bool struck;
};

static CK_ULONG begin(struct call *call, enum function function, CK_ULONG handle)
{
    *call = (struct call){.function = function};
    add(&control->slots[function].calls, 1);
    if (__atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST) > 1 && !locking)
        add(&control->calls_without_locking, 1);
    if (function == AT_C_Finalize && load(&inside) > 1)
        add(&control->finalised_under_calls, 1);
    pthread_mutex_lock(&table);
    lose_sessions();
    struct session *session = &sessions[handle & (SESSIONS - 1)];
    bool known = handle && session->handle == handle && !session->gone;
    if (known) {
        if (session->inside++ && function != AT_C_GetSessionInfo) /* which only reads */
            add(&control->sessions_shared, 1);
        call->session = session;
        call->real = session->real;
    }
    pthread_mutex_unlock(&table);
    return handle && !known ? CKR_SESSION_HANDLE_INVALID : CKR_OK;
}

static bool meant(const struct call *call, const struct fault *fault)
{
    const struct session *session = call->session;
    if (fault->pid && fault->pid != (uint64_t)getpid())
        return false;
    if (fault->mechanism != UINT64_MAX && (!session || session->mechanism != fault->mechanism))
        return false;
    if (!fault->key_size)
        return true;
    return session && session->key_size == fault->key_size && !memcmp(session->key, fault->key, fault->key_size);
}

static void nap(void)
{
    struct timespec moment = {.tv_nsec = 2000000};
    nanosleep(&moment, NULL);
}

static uint64_t milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void hang(struct slot *slot, const struct fault *fault)
{
    uint64_t until = milliseconds() + fault->value;
    add(&slot->hanging, 1);
    while (load(&slot->fault.armed) == fault->armed && (!fault->value || milliseconds() <= until))
        nap();
    add(&slot->hanging, -1);
}

static void crash(void)
{
    signal(SIGSEGV, SIG_DFL);
    raise(SIGSEGV);
    _exit(139);
}

/* Whether the fault that is set for this function acts on this call. `sized`: it asks how long the answer will be. */
static void judge(struct call *call, bool sized)
{
    struct slot *slot = &control->slots[call->function];
    struct fault *fault = &call->fault;
    uint64_t armed = load(&slot->fault.armed);
    if (!armed)
        return;
    *fault = slot->fault;
    fault->armed = armed;
    bool spoils = fault->action == TRUNCATE || fault->action == FLIP;
    if (load(&slot->fault.armed) != armed || !meant(call, fault) || (sized && spoils))
        return;
    uint64_t number = __atomic_add_fetch(&slot->seen, 1, __ATOMIC_SEQ_CST);
    if (number < fault->first || number > fault->last || (number - fault->first) % fault->every)
        return;
    call->struck = true;
    add(&slot->acted, 1);
}

/* Carry out a fault. True where `*code` is the answer, whatever the real module says. */
static bool strike(struct call *call, bool late, CK_ULONG *code)
{
    if (!call->struck || late != (bool)call->fault.late)
        return false;
    switch (call->fault.action) {
    case HANG:
        hang(&control->slots[call->function], &call->fault);
        return false;
    case CRASH:
        crash();
        return false;
    case ANSWER:
        *code = call->fault.value;
        return true;
    default:
        return false;
    }
}

static bool enter_sized(struct call *call, enum function function, CK_ULONG handle, CK_ULONG *code, bool sized)
{
    *code = begin(call, function, handle);
    if (*code != CKR_OK)
        return false;
    judge(call, sized);
    return !strike(call, false, code);
}

/* True where the real module is to be asked. */
static bool enter(struct call *call, enum function function, CK_ULONG handle, CK_ULONG *code)
{
    return enter_sized(call, function, handle, code, false);
}

static CK_ULONG leave(struct call *call, CK_ULONG code)
{
    strike(call, true, &code);
    if (code == CKR_OK)
        add(&control->slots[call->function].succeeded, 1);
    struct session *session = call->session;
    if (session) {
        pthread_mutex_lock(&table);
        if (!--session->inside && session->gone)
            free_session(session);
        pthread_mutex_unlock(&table);
    }
    __atomic_sub_fetch(&inside, 1, __ATOMIC_SEQ_CST);
    return code;
}

/* --- the functions ------------------------------------------------------------------------------------------------ */

#define REAL call.real
#define PLAIN(name, declaration, arguments)                                                                            \
    static CK_ULONG do_##name declaration                                                                              \
    {                                                                                                                  \
        struct call call;                                                                                              \
        CK_ULONG code;                                                                                                 \
        if (enter(&call, AT_##name, 0, &code))                                                                              \
            code = FORWARD(name) arguments;                                                                            \
        return leave(&call, code);                                                                                     \
    }
#define SESSION(name, declaration, arguments)                                                                          \
    static CK_ULONG do_##name declaration                                                                              \
    {                                                                                                                  \
        struct call call;                                                                                              \
        CK_ULONG code;                                                                                                 \
        if (enter(&call, AT_##name, session, &code))                                                                        \
            code = FORWARD(name) arguments;                                                                            \
        return leave(&call, code);                                                                                     \
    }
#define OWN(name, declaration)
#include "functions.h"
#undef PLAIN
#undef SESSION
#undef OWN

/* CK_C_INITIALIZE_ARGS is four pointers and then the flags, of which CKF_OS_LOCKING_OK is 2. */
static CK_ULONG do_C_Initialize(void *arguments)
{
    struct call call;
    CK_ULONG code;
    if (enter(&call, AT_C_Initialize, 0, &code)) {
        code = FORWARD(C_Initialize)(arguments);
        if (code == CKR_OK)
            locking = arguments && (((const CK_ULONG *)arguments)[4] & 2);
    }
    return leave(&call, code);
}

static CK_ULONG do_C_Finalize(void *reserved)
{
    struct call call;
    CK_ULONG code;
    if (enter(&call, AT_C_Finalize, 0, &code)) {
        code = FORWARD(C_Finalize)(reserved);
        if (code == CKR_OK)
            forget_sessions(NULL);
    }
    return leave(&call, code);
}

static CK_ULONG do_C_OpenSession(CK_ULONG slot, CK_ULONG flags, void *application, CK_NOTIFY notify, CK_ULONG *session)
{
    struct call call;
    CK_ULONG code, handle;
    if (enter(&call, AT_C_OpenSession, 0, &code)) {
        code = FORWARD(C_OpenSession)(slot, flags, application, notify, &handle);
        if (code == CKR_OK) {
            *session = remember_session(handle, slot);
            code = *session ? CKR_OK : CKR_SESSION_COUNT;
        }
    }
    return leave(&call, code);
}

static CK_ULONG do_C_CloseSession(CK_ULONG session)
{
    struct call call;
    CK_ULONG code;
    if (enter(&call, AT_C_CloseSession, session, &code)) {
        /* In the real module when the last call in it has come back: at once, if no other call is inside. */
        pthread_mutex_lock(&table);
        if (!call.session->gone)
            drop(call.session);
        pthread_mutex_unlock(&table);
    }
    return leave(&call, code);
}

static CK_ULONG do_C_CloseAllSessions(CK_ULONG slot)
{
    struct call call;
    CK_ULONG code;
    if (enter(&call, AT_C_CloseAllSessions, 0, &code)) {
        code = FORWARD(C_CloseAllSessions)(slot);
        if (code == CKR_OK)
            forget_sessions(&slot);
    }
    return leave(&call, code);
}

static CK_ULONG do_C_SignInit(CK_ULONG session, struct mechanism *mechanism, CK_ULONG key)
{
    struct call call;
    CK_ULONG code = begin(&call, AT_C_SignInit, session);
    if (code == CKR_OK) {
        call.session->mechanism = mechanism->type;
        call.session->key_size = 0;
        if (load(&control->slots[AT_C_SignInit].fault.key_size) || load(&control->slots[AT_C_Sign].fault.key_size)) {
            struct attribute id = {CKA_ID, call.session->key, KEY_BYTES};
            if (FORWARD(C_GetAttributeValue)(call.real, key, &id, 1) == CKR_OK)
                call.session->key_size = id.size;
        }
        judge(&call, false);
        if (!strike(&call, false, &code))
            code = FORWARD(C_SignInit)(call.real, mechanism, key);
    }
    return leave(&call, code);
}

static void spoil(const struct call *call, CK_BYTE *signature, CK_ULONG *size)
{
    if (!call->struck || !*size)
        return;
    if (call->fault.action == TRUNCATE)
        *size -= call->fault.value < *size ? call->fault.value : *size;
    if (call->fault.action == FLIP)
        signature[call->fault.value / 8 % *size] ^= (CK_BYTE)(1 << call->fault.value % 8);
}

static CK_ULONG do_C_Sign(CK_ULONG session, CK_BYTE *in, CK_ULONG size, CK_BYTE *signature, CK_ULONG *room)
{
    struct call call;
    CK_ULONG code;
    if (enter_sized(&call, AT_C_Sign, session, &code, !signature)) {
        code = FORWARD(C_Sign)(call.real, in, size, signature, room);
        if (code == CKR_OK)
            spoil(&call, signature, room);
    }
    return leave(&call, code);
}

static CK_ULONG do_C_SignFinal(CK_ULONG session, CK_BYTE *signature, CK_ULONG *room)
{
    struct call call;
    CK_ULONG code;
    if (enter_sized(&call, AT_C_SignFinal, session, &code, !signature)) {
        code = FORWARD(C_SignFinal)(call.real, signature, room);
        if (code == CKR_OK)
            spoil(&call, signature, room);
    }
    return leave(&call, code);
}

/* --- loading ------------------------------------------------------------------------------------------------------ */

static void load_real(void)
{
    Dl_info here;
    char path[PATH_BYTES + 16];
    if (!dladdr(&ours, &here))
        return;
    snprintf(path, sizeof path, "%s.control", here.dli_fname);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return;
    struct control *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (mapped == MAP_FAILED || mapped->ready != sizeof *control)
        return;
    void *library = dlopen(mapped->real, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return;
    }
    CK_ULONG (*get)(struct function_list **) = NULL;
    *(void **)&get = dlsym(library, "C_GetFunctionList");
    struct function_list *list;
    if (!get || get(&list) != CKR_OK)
        return;
    control = mapped;
    losses_seen = load(&control->losses);
    real = list;
    pthread_atfork(NULL, NULL, forked);
}

static CK_ULONG do_C_GetFunctionList(struct function_list **list)
{
    *list = &ours;
    return CKR_OK;
}

__attribute__((visibility("default"))) CK_ULONG C_GetFunctionList(struct function_list **list)
{
    pthread_once(&loading, load_real);
    return real ? do_C_GetFunctionList(list) : CKR_GENERAL_ERROR;
}
