/* mpicoll._node: the native part of mpi/shared.py, which does the same without it, and is where it is explained. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include <sched.h>
#include <structmember.h>
#include <time.h>

#include "node.h"

#define YIELDS 64            /* looks, each after an offer of the core, before this rank sleeps */
#define PAUSE_EVERY 16       /* looks between what else is to be driven */
#define SLEEP 200000L        /* nanoseconds, at first */
#define LONGEST 10000000L

#define KNOWN 256            /* calls that are remembered: a power of two */
#define WAYS 4               /* places among them for each call */
#define RECORDS 64           /* the latest ones, for the flight record */
#define BRIEF (64 << 10)     /* bytes up to which a call that is not compared is not recorded, as in mpi/engine.py */

typedef struct { /* a call that mpi/engine.py has decided: what is asked, and what was found */
    PyObject *callable, *op, *dtype; /* NULL for an empty place */
    size_t count;
    int in_place, deterministic;
    reduction_t r;
    uint64_t digest;
    PyObject *headers, *paths;
} known_t;

typedef struct {
    PyObject *headers;
    uint64_t call;
    double began, ended; /* seconds, as time.monotonic's; 0 if it has not ended */
} entry_t;

typedef struct {
    PyObject_HEAD
    node_t n;
    Py_buffer page, cells, boxes;
    step_t *steps;
    PyObject *pause;
    PyThreadState *released; /* while others may run Python code */
    int held, closing; /* by a call, from its first turn to its last: no other may begin */
    /* For calls from Python: */
    PyObject *state, *state_dict;            /* mpi/state.py's */
    unsigned long thread;                    /* the one that may call, */
    int anywhere;                            /* or any */
    unsigned long long calls, not_compared;  /* the first: mpi/agreement.py's */
    known_t known[KNOWN];
    unsigned stored;
    entry_t record[RECORDS];
    unsigned long long recorded;
} Node;

/* ---- waiting */

static void release_gil(Node *self)
{
    if (!self->released)
        self->released = PyEval_SaveThread();
}

static void take_gil(Node *self)
{
    if (self->released) {
        PyEval_RestoreThread(self->released);
        self->released = NULL;
    }
}

/* The MPI library and pending handles are driven meanwhile: a rank may have to answer a message before another comes. */
static int wait_longer(node_t *n, long looks)
{
    Node *self = (Node *)((char *)n - offsetof(Node, n));
    if (looks % PAUSE_EVERY == PAUSE_EVERY - 1 || looks > YIELDS) {
        int released = self->released != NULL;
        take_gil(self);
        if (PyErr_CheckSignals())
            return BROKEN_OFF;
        PyObject *pause = Py_XNewRef(self->pause), *done = pause ? PyObject_CallNoArgs(pause) : NULL;
        Py_XDECREF(pause);
        if (!done)
            return BROKEN_OFF;
        Py_DECREF(done);
        if (released)
            release_gil(self);
    }
    release_gil(self);
    if (looks < YIELDS)
        sched_yield();
    else {
        long slept = looks - YIELDS, nanoseconds = SLEEP << (slept < 6 ? slept : 6);
        node_sleep(n, nanoseconds < LONGEST ? nanoseconds : LONGEST);
    }
    return DONE;
}

static int enter(Node *self)
{
    if (!self->n.ranks) {
        PyErr_SetString(PyExc_RuntimeError, "this communicator was freed: make a new one");
        return -1;
    }
    return 0;
}

/* ---- turns */

static PyObject *Node_sync(Node *self, PyObject *Py_UNUSED(nothing))
{
    if (enter(self))
        return NULL;
    int broken = node_turn(&self->n, 0, NULL, 0);
    take_gil(self);
    if (broken)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *numbers_of(Node *self)
{
    PyObject *found = PyList_New(self->n.p);
    for (int q = 0; found && q < self->n.p; q++) {
        PyObject *number = PyLong_FromUnsignedLongLong(node_slot(&self->n, q)->number);
        if (!number)
            Py_CLEAR(found);
        else
            PyList_SET_ITEM(found, q, number);
    }
    return found;
}

static PyObject *words_of(Node *self, Py_ssize_t n)
{
    PyObject *found = PyList_New(self->n.p);
    for (int q = 0; found && q < self->n.p; q++) {
        const slot_t *slot = node_slot(&self->n, q);
        PyObject *theirs = PyList_New(n);
        for (Py_ssize_t k = 0; theirs && k < n; k++) {
            uint64_t word;
            memcpy(&word, slot->data + k * sizeof word, sizeof word);
            PyObject *number = PyLong_FromUnsignedLongLong(word);
            if (!number)
                Py_CLEAR(theirs);
            else
                PyList_SET_ITEM(theirs, k, number);
        }
        if (!theirs)
            Py_CLEAR(found);
        else
            PyList_SET_ITEM(found, q, theirs);
    }
    return found;
}

static PyObject *Node_gather(Node *self, PyObject *argument)
{
    uint64_t number = PyLong_AsUnsignedLongLong(argument);
    if ((number == (uint64_t)-1 && PyErr_Occurred()) || enter(self))
        return NULL;
    int broken = node_turn(&self->n, number, NULL, 0);
    take_gil(self);
    return broken ? NULL : numbers_of(self);
}

static PyObject *Node_exchange(Node *self, PyObject *const *args, Py_ssize_t n)
{
    uint64_t words[INLINE / sizeof(uint64_t)];
    if (n > (Py_ssize_t)(sizeof words / sizeof *words)) {
        PyErr_Format(PyExc_ValueError, "exchange: expected at most %zu numbers, got %zd", sizeof words / sizeof *words, n);
        return NULL;
    }
    for (Py_ssize_t k = 0; k < n; k++) {
        words[k] = PyLong_AsUnsignedLongLong(args[k]);
        if (words[k] == (uint64_t)-1 && PyErr_Occurred())
            return NULL;
    }
    if (enter(self))
        return NULL;
    int broken = node_turn(&self->n, 0, words, n * sizeof *words);
    take_gil(self);
    return broken ? NULL : words_of(self, n);
}

/* ---- reductions */

static int opened(Py_buffer *held, PyObject *memory, size_t expected)
{
    Py_buffer view;
    if (PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE))
        return -1;
    if ((size_t)view.len < expected) {
        PyErr_Format(PyExc_ValueError, "expected %zu bytes of shared memory, got %zd", expected, view.len);
        PyBuffer_Release(&view);
        return -1;
    }
    *held = view;
    return 0;
}

static PyObject *Node_open_cells(Node *self, PyObject *memory)
{
    if (self->n.cells || opened(&self->cells, memory, node_cells(self->n.p)))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    self->n.cells = self->cells.buf;
    Py_RETURN_NONE;
}

static PyObject *Node_open_boxes(Node *self, PyObject *memory)
{
    if (self->n.boxes || opened(&self->boxes, memory, node_boxes(self->n.p)))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    self->n.boxes = self->boxes.buf;
    Py_RETURN_NONE;
}

static PyObject *allreduce(Node *self, const reduction_t *r, uint64_t number, int compare, const uint64_t *where,
                           const void *send, void *recv)
{
    if (enter(self))
        return NULL;
    if (r->nbytes > CELL)
        release_gil(self);
    int how = node_allreduce(&self->n, r, number, compare, where, send, recv);
    take_gil(self);
    if (how == BROKEN_OFF)
        return NULL;
    if (how == DONE)
        Py_RETURN_NONE;
    return how == DIFFERENT ? numbers_of(self) : words_of(self, WORDS);
}

/* allreduce(number, compare, operation, type, mean, where, send, recv): None, or what was found instead: numbers of all
   ranks that are not the same, or where their arrays lie. */
static PyObject *Node_allreduce(Node *self, PyObject *const *args, Py_ssize_t n)
{
    if (n != 8) {
        PyErr_Format(PyExc_TypeError, "allreduce: expected 8 arguments, got %zd", n);
        return NULL;
    }
    uint64_t number = PyLong_AsUnsignedLongLong(args[0]), words[WORDS], *where = NULL;
    int compare = PyObject_IsTrue(args[1]), operation = (int)PyLong_AsLong(args[2]), mean = PyObject_IsTrue(args[4]);
    if (PyErr_Occurred())
        return NULL;
    const kind_t *kind = PyUnicode_Check(args[3]) ? kernels_of(PyUnicode_READ_CHAR(args[3], 0)) : NULL;
    if (!kind || operation < 0 || operation >= OPERATIONS || !PyArray_Check(args[6]) || !PyArray_Check(args[7])) {
        PyErr_SetString(PyExc_TypeError, "allreduce: expected a kind and an operation that there is, and arrays");
        return NULL;
    }
    PyArrayObject *send = (PyArrayObject *)args[6], *recv = (PyArrayObject *)args[7];
    reduction_t r = {kind, operation, mean, (size_t)PyArray_SIZE(recv), (size_t)PyArray_NBYTES(recv)};
    if (PyArray_NBYTES(send) != PyArray_NBYTES(recv) || r.nbytes != r.count * kind->size ||
        (r.nbytes > CELL ? !self->n.boxes : r.nbytes > INLINE && !self->n.cells)) {
        PyErr_SetString(PyExc_ValueError, "allreduce: expected two arrays of the kind, of one length, and open memory");
        return NULL;
    }
    if (args[5] != Py_None) {
        if (!PyTuple_Check(args[5]) || PyTuple_GET_SIZE(args[5]) != WORDS) {
            PyErr_SetString(PyExc_TypeError, "allreduce: expected four numbers where arrays lie");
            return NULL;
        }
        for (int k = 0; k < WORDS; k++)
            words[k] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(args[5], k));
        if (PyErr_Occurred())
            return NULL;
        where = words;
    }
    return allreduce(self, &r, number, compare, where, PyArray_DATA(send), PyArray_DATA(recv));
}

/* ---- calls from Python, whole */

static void let_go(Node *self);

typedef struct { /* what mpi/compiled.py passes to prepare, once: objects, and names of other modules */
    PyObject *in_place, *plain, *under_way, *interrupted, *windows, *attach, *agreement;
    PyObject *header, *off, *op, *fast, *check, *deterministic, *last, *default_level, *keyval, *get_attr, *unfinished,
        *interrupt;
    PyTypeObject *node;
    long no_keyval;
    PyObject *without; /* where the latest communicator of mpi4py's own is that had no node: not to ask it again */
} names_t;

static names_t names;

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *function; /* does the same, and whatever is not done here */
    PyObject *op;       /* if none is passed */
    PyObject *dict, *weak;
    int method; /* of a communicator; or a function of an array, which it reduces in place and returns */
} Call;

static size_t known_at(const PyObject *callable, const PyObject *op, const PyObject *dtype, size_t count, int how)
{
    size_t mixed = ((uintptr_t)callable >> 4) * 31 + ((uintptr_t)op >> 4);
    mixed = (mixed * 31 + ((uintptr_t)dtype >> 4)) * 31 + count * 4 + how;
    return (mixed * 0x9E3779B97F4A7C15u >> 32) & (KNOWN - WAYS);
}

/* What is stored for a call, or NULL; any then becomes the first of its places. */
static inline known_t *find(Node *node, const PyObject *callable, const PyObject *op, const PyObject *dtype, size_t count,
                            int in_place, int deterministic, known_t **any)
{
    known_t *first = &node->known[known_at(callable, op, dtype, count, in_place * 2 + deterministic)];
    for (known_t *one = first; one < first + WAYS; one++)
        if (one->callable == callable && one->op == op && one->dtype == dtype && one->count == count &&
            one->in_place == in_place && one->deterministic == deterministic)
            return one;
    *any = first;
    return NULL;
}

static void forget(known_t *one)
{
    Py_CLEAR(one->callable);
    Py_CLEAR(one->op);
    Py_CLEAR(one->dtype);
    Py_CLEAR(one->headers);
    Py_CLEAR(one->paths);
}

static double seconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

#ifdef CLOCK_MONOTONIC_COARSE /* a quarter as long, and good to some milliseconds: enough for an end */
#define ROUGHLY CLOCK_MONOTONIC_COARSE
#else
#define ROUGHLY CLOCK_MONOTONIC
#endif

/* A borrowed reference to what hangs on mpi4py's own communicator, in mpi/attach.py's way: it is kept there. */
static PyObject *attached(PyObject *comm)
{
    PyObject *keyval = PyDict_GetItemWithError(names.attach, names.keyval), *args[] = {comm, keyval};
    int there = keyval && PyLong_Check(keyval) && PyLong_AsLong(keyval) != names.no_keyval && PyObject_IsTrue(comm) > 0;
    PyObject *state = there ? PyObject_VectorcallMethod(names.get_attr, args, 2, NULL) : NULL;
    PyObject *dict = state && state != Py_None ? PyObject_GenericGetDict(state, NULL) : NULL;
    PyObject *found = dict ? PyDict_GetItemWithError(dict, names.fast) : NULL;
    Py_XDECREF(dict);
    Py_XDECREF(state);
    return found;
}

/* A borrowed reference to the node of a communicator, and how its calls are to be made; NULL for the long way. */
static Node *node_of(PyObject *comm, int method, int *compares, int *deterministic)
{
    PyObject *found, *level, *canonical = Py_False;
    if (!method && (PyObject *)Py_TYPE(comm) == names.plain) {
        if (comm == names.without)
            return NULL;
        found = attached(comm);
        names.without = found && found != Py_None ? NULL : comm;
        level = PyDict_GetItemWithError(names.agreement, names.default_level);
    } else {
        PyObject *dict = PyObject_GenericGetDict(comm, NULL);
        found = dict ? PyDict_GetItemWithError(dict, names.fast) : NULL;
        level = found ? PyDict_GetItemWithError(dict, names.check) : NULL;
        canonical = level ? PyDict_GetItemWithError(dict, names.deterministic) : NULL;
        Py_XDECREF(dict); /* which the communicator keeps, and its items */
    }
    PyErr_Clear(); /* the long way tells what is wrong with it */
    if (!found || Py_TYPE(found) != names.node || (level != names.header && level != names.off) ||
        (canonical != Py_False && canonical != Py_True))
        return NULL;
    *compares = level == names.header;
    *deterministic = canonical == Py_True;
    return (Node *)found;
}

static int is_ready(PyObject *x, int flags)
{
    return PyArray_CheckExact(x) && (PyArray_FLAGS((PyArrayObject *)x) & flags) == flags;
}

/* 1: done; 0: nothing is done, and the long way is to be taken; -1: an error. */
static int call_fast(Call *self, PyObject *comm, PyObject *send, PyObject *recv, PyObject *op)
{
    int compares, deterministic, in_place = !send || send == names.in_place || send == Py_None;
    if (!names.in_place || !is_ready(recv, NPY_ARRAY_CARRAY))
        return 0;
    PyArrayObject *to = (PyArrayObject *)recv, *from = in_place ? to : (PyArrayObject *)send;
    if (!in_place && (!is_ready(send, NPY_ARRAY_CARRAY_RO) || PyArray_DESCR(from) != PyArray_DESCR(to) ||
                      PyArray_SIZE(from) != PyArray_SIZE(to)))
        return 0;
    Node *node = node_of(comm, self->method, &compares, &deterministic);
    if (!node || node->held || !(node->anywhere || node->thread == PyThread_get_thread_ident()) || PyList_GET_SIZE(names.under_way) ||
        PySet_GET_SIZE(names.interrupted))
        return 0;
    size_t count = (size_t)PyArray_SIZE(to);
    PyObject *dtype = (PyObject *)PyArray_DESCR(to);
    known_t *any, *one = find(node, (PyObject *)self, op, dtype, count, in_place, deterministic, &any);
    if (!one)
        return 0;
    reduction_t r = one->r;
    if (node->n.p == 1)
        compares = 0;
    else if (r.nbytes > INLINE && (r.nbytes > CELL ? !node->n.boxes : !node->n.cells))
        return 0;
    else if (r.nbytes > CELL && PyDict_GET_SIZE(names.windows) && (PyArray_BASE(to) || PyArray_BASE(from)))
        return 0; /* they may lie in memory that ranks share */
    if (!compares && r.nbytes > BRIEF)
        return 0;

    PyObject *headers = Py_NewRef(one->headers);
    uint64_t number = one->digest;
    if (PyDict_SetItem(node->state_dict, names.last, one->paths)) {
        Py_DECREF(headers);
        return -1;
    }
    entry_t *entry = NULL;
    node->held = 1;
    if (!compares)
        node->not_compared += node->n.p > 1;
    else {
        number ^= ++node->calls * 0x9E3779B97F4A7C15u & ~(uint64_t)0xFFFFFF; /* as Agreement.number */
        entry = &node->record[node->recorded++ % RECORDS];
        Py_XSETREF(entry->headers, Py_NewRef(headers));
        entry->call = node->calls, entry->began = seconds(CLOCK_MONOTONIC), entry->ended = 0;
    }
    Py_INCREF(node);
    PyObject *state = Py_NewRef(node->state); /* which the node lets go of if it is closed meanwhile */
    PyObject *found = allreduce(node, &r, number, compares, NULL, PyArray_DATA(from), PyArray_DATA(to));
    int broken = !found; /* in the middle: others may be anywhere */
    let_go(node);
    if (found && found != Py_None) { /* the ranks' calls differ, or some arrays lie in shared memory */
        PyObject *args[] = {state, headers, found, (PyObject *)from, recv};
        PyObject *done = PyObject_VectorcallMethod(names.unfinished, args, 5, NULL);
        Py_SETREF(found, done);
    }
    if (broken) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        Py_XDECREF(PyObject_CallMethodNoArgs(state, names.interrupt));
        PyErr_Restore(type, value, traceback);
    }
    if (entry) {
        double end = seconds(ROUGHLY);
        entry->ended = end > entry->began ? end : entry->began;
    }
    Py_DECREF(headers);
    Py_DECREF(state);
    Py_DECREF(node);
    Py_XDECREF(found);
    return found ? 1 : -1;
}

static PyObject *Call_vectorcall(Call *self, PyObject *const *args, size_t nargsf, PyObject *kwnames)
{
    Py_ssize_t n = PyVectorcall_NARGS(nargsf), least = self->method ? 3 : 2;
    Py_ssize_t named = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
    int by_name = named == 1 && n == least && PyTuple_GET_ITEM(kwnames, 0) == names.op; /* args[n] is op all the same */
    PyObject *op = by_name || n == least + 1 ? args[least] : self->op;
    if (by_name || (!named && (n == least || n == least + 1))) {
        PyObject *recv = self->method ? args[2] : args[0];
        int done = self->method ? call_fast(self, args[0], args[1], recv, op) : call_fast(self, args[1], NULL, recv, op);
        if (done)
            return done < 0 ? NULL : Py_NewRef(self->method ? Py_None : recv);
    }
    return PyObject_Vectorcall(self->function, args, nargsf, kwnames);
}

/* learn(callable, op, dtype, count, in_place, deterministic, digest, (operation, type, mean), headers, paths) */
static PyObject *Node_learn(Node *self, PyObject *args)
{
    PyObject *callable, *op, *dtype, *headers, *paths;
    Py_ssize_t count;
    int in_place, deterministic, operation, type, mean;
    unsigned long long digest;
    if (!PyArg_ParseTuple(args, "OOOnppK(iCp)OO", &callable, &op, &dtype, &count, &in_place, &deterministic, &digest,
                          &operation, &type, &mean, &headers, &paths))
        return NULL;
    const kind_t *kind = kernels_of(type);
    if (!self->state || !kind || operation < 0 || operation >= OPERATIONS) {
        PyErr_SetString(PyExc_ValueError, "learn: expected a kind and an operation that there is, after bind");
        return NULL;
    }
    known_t *first, *one = find(self, callable, op, dtype, (size_t)count, in_place, deterministic, &first);
    for (int k = 0; !one && k < WAYS; k++)
        one = first[k].callable ? NULL : &first[k];
    if (!one)
        one = first + self->stored++ % WAYS; /* in the place of another */
    forget(one);
    *one = (known_t){Py_NewRef(callable), Py_NewRef(op), Py_NewRef(dtype), (size_t)count, in_place, deterministic,
                     {kind, operation, mean, (size_t)count, (size_t)count * kind->size}, digest, Py_NewRef(headers),
                     Py_NewRef(paths)};
    names.without = NULL;
    Py_RETURN_NONE;
}

static PyObject *Node_forget(Node *self, PyObject *Py_UNUSED(nothing))
{
    for (int k = 0; k < KNOWN; k++)
        forget(&self->known[k]);
    Py_RETURN_NONE;
}

/* bind(state, anywhere): whether calls may come from any thread, or from this one only. */
static PyObject *Node_bind(Node *self, PyObject *args)
{
    PyObject *state, *dict;
    if (!PyArg_ParseTuple(args, "Op", &state, &self->anywhere) || !(dict = PyObject_GenericGetDict(state, NULL)))
        return NULL;
    self->thread = PyThread_get_thread_ident();
    Py_XSETREF(self->state, Py_NewRef(state));
    Py_XSETREF(self->state_dict, dict);
    Py_RETURN_NONE;
}

/* The calls since the first of that number, oldest first: (headers, call, began, ended); and the number of the next. */
static PyObject *Node_recent(Node *self, PyObject *argument)
{
    unsigned long long first = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    if (self->recorded > RECORDS && first < self->recorded - RECORDS)
        first = self->recorded - RECORDS;
    PyObject *found = PyList_New(0);
    for (unsigned long long k = first; found && k < self->recorded; k++) {
        entry_t *one = &self->record[k % RECORDS];
        if (!one->headers) /* of a communicator that was freed */
            continue;
        PyObject *item = Py_BuildValue("(OKdd)", one->headers, one->call, one->began, one->ended);
        if (!item || PyList_Append(found, item))
            Py_CLEAR(found);
        Py_XDECREF(item);
    }
    return found ? Py_BuildValue("(NK)", found, self->recorded) : NULL;
}

static PyObject *Call_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    PyObject *function, *op;
    int method;
    if (!PyArg_ParseTuple(args, "OOp", &function, &op, &method))
        return NULL;
    Call *self = (Call *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->vectorcall = (vectorcallfunc)Call_vectorcall;
    self->function = Py_NewRef(function), self->op = Py_NewRef(op), self->method = method;
    return (PyObject *)self;
}

static PyObject *Call_get(PyObject *self, PyObject *object, PyObject *Py_UNUSED(type))
{
    return !object || object == Py_None ? Py_NewRef(self) : PyMethod_New(self, object);
}

static PyObject *Call_repr(Call *self)
{
    return PyObject_Repr(self->function);
}

static PyObject *Call_reduce(Call *self, PyObject *Py_UNUSED(nothing))
{
    return PyObject_GetAttrString(self->function, "__qualname__"); /* found by its name, as functions are */
}

static int Call_traverse(Call *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->function);
    Py_VISIT(self->op);
    Py_VISIT(self->dict);
    return 0;
}

static int Call_clear(Call *self)
{
    Py_CLEAR(self->function);
    Py_CLEAR(self->op);
    Py_CLEAR(self->dict);
    return 0;
}

static void Call_dealloc(Call *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->weak)
        PyObject_ClearWeakRefs((PyObject *)self);
    Call_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef call_methods[] = {
    {"__reduce__", (PyCFunction)Call_reduce, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef call_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Call, vectorcall), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(Call, dict), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Call, weak), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef call_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot call_slots[] = {
    {Py_tp_doc, "A collective call: the usual forms of it in machine code, all others by a function."},
    {Py_tp_new, Call_new},
    {Py_tp_dealloc, Call_dealloc},
    {Py_tp_traverse, Call_traverse},
    {Py_tp_clear, Call_clear},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_descr_get, Call_get},
    {Py_tp_repr, Call_repr},
    {Py_tp_methods, call_methods},
    {Py_tp_members, call_members},
    {Py_tp_getset, call_getset},
    {0, NULL},
};

static PyType_Spec call_spec = {
    "mpicoll._node.Call", sizeof(Call), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR, call_slots,
};

/* ---- the type */

static PyObject *Node_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    PyObject *memory, *order, *pause;
    int rank, p;
    long spin;
    if (!PyArg_ParseTuple(args, "OiilO!O", &memory, &rank, &p, &spin, &PyTuple_Type, &order, &pause))
        return NULL;
    Node *self = (Node *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    Py_ssize_t steps = PyTuple_GET_SIZE(order);
    self->pause = Py_NewRef(pause);
    self->steps = PyMem_Calloc(steps + 1, sizeof *self->steps);
    self->n.scratch = PyMem_Calloc(node_scratch(p), 1);
    if (!self->steps || !self->n.scratch) {
        PyErr_NoMemory();
        goto failed;
    }
    if (opened(&self->page, memory, node_page(p)))
        goto failed;
    for (Py_ssize_t k = 0; k < steps; k++) {
        int lower, higher, into;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(order, k), "iii", &lower, &higher, &into))
            goto failed;
        self->steps[k] = (step_t){(int16_t)lower, (int16_t)higher, (int16_t)into};
    }
    self->n.ranks = self->page.buf;
    self->n.rank = rank, self->n.p = p, self->n.spin = spin;
    self->n.steps = self->steps, self->n.n_steps = (int)steps, self->n.wait = wait_longer;
    return (PyObject *)self;
failed:
    Py_DECREF(self);
    return NULL;
}

static int Node_traverse(Node *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->pause);
    Py_VISIT(self->state);
    Py_VISIT(self->state_dict);
    for (int k = 0; k < KNOWN; k++) {
        Py_VISIT(self->known[k].callable);
        Py_VISIT(self->known[k].op);
        Py_VISIT(self->known[k].headers);
        Py_VISIT(self->known[k].paths);
    }
    return 0;
}

static int Node_clear(Node *self)
{
    names.without = NULL;
    Py_CLEAR(self->pause);
    Py_CLEAR(self->state);
    Py_CLEAR(self->state_dict);
    for (int k = 0; k < KNOWN; k++)
        forget(&self->known[k]);
    for (int k = 0; k < RECORDS; k++)
        Py_CLEAR(self->record[k].headers);
    return 0;
}

static void release_memory(Node *self)
{
    Py_buffer *held[] = {&self->page, &self->cells, &self->boxes};
    for (int k = 0; k < 3; k++)
        if (held[k]->obj)
            PyBuffer_Release(held[k]);
    self->n.ranks = NULL, self->n.cells = self->n.boxes = NULL;
}

/* The end of a call; if the communicator was freed meanwhile, of more. */
static void let_go(Node *self)
{
    self->held = 0;
    if (self->closing) {
        Node_clear(self);
        release_memory(self);
    }
}

static void Node_dealloc(Node *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Node_clear(self);
    release_memory(self);
    PyMem_Free(self->steps);
    PyMem_Free(self->n.scratch);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *Node_close(Node *self, PyObject *Py_UNUSED(nothing))
{
    self->closing = 1;
    if (!self->held)
        let_go(self);
    Py_RETURN_NONE;
}

/* As a lock's, so that mpi/state.py need not know which it has. */
static PyObject *Node_acquire(Node *self, PyObject *Py_UNUSED(blocking))
{
    if (self->held)
        Py_RETURN_FALSE;
    self->held = 1;
    Py_RETURN_TRUE;
}

static PyObject *Node_release(Node *self, PyObject *Py_UNUSED(nothing))
{
    let_go(self);
    Py_RETURN_NONE;
}

static PyMethodDef node_methods[] = {
    {"sync", (PyCFunction)Node_sync, METH_NOARGS, "Wait until all ranks have come here; what they wrote is seen after."},
    {"gather", (PyCFunction)Node_gather, METH_O, "One number of each rank, seen by all."},
    {"exchange", (PyCFunction)(void (*)(void))Node_exchange, METH_FASTCALL, "Some numbers of each rank, seen by all."},
    {"open_cells", (PyCFunction)Node_open_cells, METH_O, "Take shared memory for vectors of up to CELL bytes."},
    {"open_boxes", (PyCFunction)Node_open_boxes, METH_O, "Take shared memory for longer ones."},
    {"allreduce", (PyCFunction)(void (*)(void))Node_allreduce, METH_FASTCALL, "Compare, and reduce."},
    {"acquire", (PyCFunction)Node_acquire, METH_O, "Whether the caller now holds it: no other call may begin."},
    {"release", (PyCFunction)Node_release, METH_NOARGS, "Let others begin."},
    {"bind", (PyCFunction)Node_bind, METH_VARARGS, "Take the state that calls from Python are recorded in."},
    {"learn", (PyCFunction)Node_learn, METH_VARARGS, "Remember what was decided for a call from Python."},
    {"close", (PyCFunction)Node_close, METH_NOARGS, "Let go of the state and of shared memory: no more calls."},
    {"forget", (PyCFunction)Node_forget, METH_NOARGS, "Forget all that was remembered."},
    {"recent", (PyCFunction)Node_recent, METH_O, "The calls from Python since one of a number, oldest first."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef node_members[] = {
    {"turn", T_ULONGLONG, offsetof(Node, n.turn), READONLY, "Turns so far."},
    {"calls", T_ULONGLONG, offsetof(Node, calls), 0, "Calls so far that were compared."},
    {"not_compared", T_ULONGLONG, offsetof(Node, not_compared), READONLY, "Calls from Python that were not."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot node_slots[] = {
    {Py_tp_doc, "The ranks of a node that share memory, and how they take turns."},
    {Py_tp_new, Node_new},
    {Py_tp_dealloc, Node_dealloc},
    {Py_tp_traverse, Node_traverse},
    {Py_tp_clear, Node_clear},
    {Py_tp_methods, node_methods},
    {Py_tp_members, node_members},
    {0, NULL},
};

static PyType_Spec node_spec = {
    "mpicoll._node.Node", sizeof(Node), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, node_slots,
};

static int execute(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &node_spec, NULL);
    PyObject *call = PyType_FromModuleAndSpec(module, &call_spec, NULL);
    if (!type || !call || PyModule_AddObjectRef(module, "Node", type) || PyModule_AddObjectRef(module, "Call", call))
        return -1;
    names.node = (PyTypeObject *)type;
    struct {
        PyObject **name;
        const char *text;
    } texts[] = {{&names.header, "header"}, {&names.off, "off"}, {&names.op, "op"}, {&names.fast, "_fast"},
                 {&names.check, "check"}, {&names.deterministic, "deterministic"}, {&names.last, "last"},
                 {&names.default_level, "_default"}, {&names.keyval, "_keyval"}, {&names.get_attr, "Get_attr"},
                 {&names.unfinished, "unfinished"}, {&names.interrupt, "interrupt"}};
    for (size_t k = 0; k < sizeof texts / sizeof *texts; k++)
        if (!(*texts[k].name = PyUnicode_InternFromString(texts[k].text)))
            return -1;
    Py_DECREF(call);
    return PyModule_AddIntConstant(module, "INLINE", INLINE) || PyModule_AddIntConstant(module, "CELL", CELL) ||
                   PyModule_AddIntConstant(module, "LAYOUT", LAYOUT)
               ? -1
               : 0;
}

/* Bytes of shared memory for p ranks: the page, cells, boxes. */
static PyObject *sizes(PyObject *Py_UNUSED(module), PyObject *argument)
{
    int p = (int)PyLong_AsLong(argument);
    if (PyErr_Occurred())
        return NULL;
    return Py_BuildValue("(nnn)", (Py_ssize_t)node_page(p), (Py_ssize_t)node_cells(p), (Py_ssize_t)node_boxes(p));
}

static PyObject *does(PyObject *Py_UNUSED(module), PyObject *args)
{
    int operation, type;
    if (!PyArg_ParseTuple(args, "iC", &operation, &type))
        return NULL;
    const kind_t *kind = kernels_of(type);
    int widens = kind && kind->widen && (operation == OP_SUM || operation == OP_PROD);
    return PyBool_FromLong(kind && operation >= 0 && operation < OPERATIONS && (widens || kind->combine[operation]));
}

/* prepare(in_place, plain, under_way, interrupted, windows, attach, agreement, no_keyval): what calls look at. */
static PyObject *prepare(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *one[7];
    if (!PyArg_ParseTuple(args, "OOO!O!O!O!O!l", &one[0], &one[1], &PyList_Type, &one[2], &PySet_Type, &one[3],
                          &PyDict_Type, &one[4], &PyDict_Type, &one[5], &PyDict_Type, &one[6], &names.no_keyval))
        return NULL;
    PyObject **kept[] = {&names.in_place, &names.plain,  &names.under_way, &names.interrupted,
                         &names.windows,  &names.attach, &names.agreement};
    for (int k = 0; k < 7; k++)
        Py_XSETREF(*kept[k], Py_NewRef(one[k]));
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"prepare", prepare, METH_VARARGS, "Take what calls from Python look at."},
    {"sizes", sizes, METH_O, "Bytes of shared memory for p ranks: the page, cells, and boxes."},
    {"does", does, METH_VARARGS, "Whether there is code for an operation on a kind of elements."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "mpicoll._node", "Collectives in memory that ranks share, compiled.", 0, functions, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__node(void)
{
    import_array();
    return PyModuleDef_Init(&definition);
}
