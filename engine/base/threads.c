/* threads.c - loops on all cores: a pool of threads, and how they wait for each other.
 *
 * A compiler turns the statement after `#pragma omp parallel` into a function, and hands it to its runtime library for
 * all threads to run: gcc calls GOMP_parallel(), clang __kmpc_fork_call(). Nothing else of OpenMP is used here. Both
 * functions stand in this file, and neither library is linked. The libraries make every thread wait for every other
 * at the end of each loop, and spin for milliseconds meanwhile. On a core that another program needs, that holds up
 * the very thread that is waited for, in thousands of loops a clip.
 *
 * Here every thread that comes walks through the loop and runs the iterations that it takes. Taking one adds 1 to a
 * counter, so each iteration goes to a thread that is free. Nobody waits for a thread that does not come:
 *
 *   main thread   opens the gate, wakes who sleeps; walks; shuts the gate; waits until nobody is inside
 *   workers       wait until the gate is open; go inside; walk; shut the gate, for nothing is left to take; leave
 *
 * A thread that waits looks again and again for about as long as waking up would take; then it sleeps. */
#include "engine/engine.h"

#ifdef _OPENMP

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static int made = 1;                            /* threads, the main one included */
static atomic_int sharing = 1;                  /* of them, how many share a loop */
static _Thread_local int number;                /* 0 is the main thread's */
static _Thread_local atomic_size_t *iterations; /* how many are taken of the loop that this thread is in, or NULL */

int threads_count(void) { return sharing; }

int thread_index(void) { return number; }

size_t thread_takes(void) { return atomic_fetch_add_explicit(iterations, 1, memory_order_relaxed) + 1; }

/* ---------------------------------------------------------------- the loop, and the gate to it */

enum { OPEN = 1, INSIDE = 2 };        /* gate: a bit, and so many times the threads inside */
static _Alignas(64) atomic_uint gate; /* in a cache line of its own, as is what follows */
static _Alignas(64) atomic_size_t taken;
static _Alignas(64) struct {
    void (*run)(void *);
    void *variables;
} loop;

static bool may_enter(void) { return (gate & OPEN) && number < sharing; }

static bool is_empty(void) { return gate == 0; }

static bool enter(void) {
    unsigned now = gate;
    while (now & OPEN)
        if (atomic_compare_exchange_weak(&gate, &now, now + INSIDE)) return true;
    return false;
}

/* ---------------------------------------------------------------- waiting */

#define PATIENCE 50e-6 /* seconds before a thread sleeps */

/* What threads wait for, and how many of them sleep. */
typedef struct {
    bool (*until)(void);
    pthread_cond_t changed;
    atomic_int asleep;
} Wait;
static Wait open_gate = {may_enter, PTHREAD_COND_INITIALIZER, 0}, empty_loop = {is_empty, PTHREAD_COND_INITIALIZER, 0};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void wait_for(Wait *wait) {
    if (wait->until()) return;
    for (double start = seconds(); seconds() - start < PATIENCE;)
        if (wait->until()) return;
    pthread_mutex_lock(&lock);
    wait->asleep++;
    while (!wait->until()) pthread_cond_wait(&wait->changed, &lock);
    wait->asleep--;
    pthread_mutex_unlock(&lock);
}

/* To be called once it is so. A thread that is falling asleep is counted already, or looks once more. */
static void wake(Wait *wait) {
    if (!wait->asleep) return;
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&wait->changed);
    pthread_mutex_unlock(&lock);
}

/* ---------------------------------------------------------------- the two sides */

static void *work(void *own) {
    number = (int)(intptr_t)own;
    iterations = &taken;
    for (;;) {
        wait_for(&open_gate);
        if (!enter()) continue;
        if (number < sharing) { /* they may have become fewer meanwhile */
            loop.run(loop.variables);
            gate &= ~(unsigned)OPEN;
        }
        if (atomic_fetch_sub(&gate, INSIDE) == INSIDE) wake(&empty_loop);
    }
    return NULL;
}

/* A loop within a loop, and a loop of one thread. */
static void run_alone(void (*run)(void *), void *variables) {
    atomic_size_t own = 0, *outer = iterations;
    iterations = &own;
    run(variables);
    iterations = outer;
}

static void run_shared(void (*run)(void *), void *variables) {
    loop.run = run;
    loop.variables = variables;
    taken = 0;
    gate = OPEN;
    wake(&open_gate);
    iterations = &taken;
    run(variables);
    iterations = NULL;
    gate &= ~(unsigned)OPEN;
    wait_for(&empty_loop);
}

static void run_loop(void (*run)(void *), void *variables) {
    if (iterations || sharing == 1) run_alone(run, variables);
    else run_shared(run, variables);
}

/* ---------------------------------------------------------------- what compilers call */

#if !defined(__clang__)
void GOMP_parallel(void (*run)(void *), void *variables, unsigned threads, unsigned flags) {
    (void)threads, (void)flags;
    run_loop(run, variables);
}
#else
/* clang's functions take the addresses of two numbers, which ours do not use, then that of each variable. They are
 * called with more arguments than they take; that is harmless, since the caller removes them. */
enum { MAX_VARIABLES = 24 };
typedef struct {
    void (*run)(int *, int *, ...);
    void *v[MAX_VARIABLES];
} Call;

__attribute__((no_sanitize("undefined"))) static void call(void *of) {
    void **v = ((Call *)of)->v;
    int thread = number;
    ((Call *)of)->run(&thread, &thread, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12],
                      v[13], v[14], v[15], v[16], v[17], v[18], v[19], v[20], v[21], v[22], v[23]);
}

void __kmpc_fork_call(void *where, int variables, void (*run)(int *, int *, ...), ...) {
    Call c = {run, {NULL}};
    va_list arguments;
    (void)where;
    if (variables > MAX_VARIABLES) die(STATUS_RESOURCE, "a loop of %d variables (a bug)", variables);
    va_start(arguments, run);
    for (int i = 0; i < variables; i++) c.v[i] = va_arg(arguments, void *);
    va_end(arguments);
    run_loop(call, &c);
}
#endif

/* ---------------------------------------------------------------- how many */

int threads_default(void) {
    const char *variable = getenv("OMP_NUM_THREADS");
    int wanted = variable ? atoi(variable) : 0;
    return smaller(wanted > 0 ? wanted : processors_available(), MAX_THREADS);
}

/* Signals reach the main thread alone, but for SIGBUS, which comes to whoever reads the page. */
static int make_worker(int own, const pthread_attr_t *attributes) {
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* the new thread inherits it */
    int error = pthread_create(&thread, attributes, work, (void *)(intptr_t)own);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

void threads_set(int wanted) {
    enum { STACK = 1 << 20 }; /* musl's own are too small */
    pthread_attr_t attributes;
    int error = 0;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (made < wanted && !(error = make_worker(made, &attributes))) made++;
    pthread_attr_destroy(&attributes);
    if (error)
        die(STATUS_RESOURCE, "%d threads cannot be had, only %d: %s; is there a limit on processes or memory? --threads "
            "sets their number", wanted, made, strerror(error));
    sharing = wanted;
}

#else

int threads_default(void) { return 1; }
void threads_set(int wanted) { (void)wanted; }
int threads_count(void) { return 1; }
int thread_index(void) { return 0; }

#endif
