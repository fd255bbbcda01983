/* threads.c - the thread pool that runs PARALLEL_FOR.
 *
 * The compiler turns the statement after `#pragma omp parallel` into a function. It passes this function to its OpenMP
 * runtime library, which calls it on every thread: gcc calls GOMP_parallel(), clang calls __kmpc_fork_call(). This file
 * defines both, so neither library is linked. No other part of OpenMP is used. The libraries end each loop with a
 * barrier at which threads spin for milliseconds. If another program needs a core, the spinning threads delay the
 * thread that they wait for. A clip takes thousands of loops.
 *
 * Here each thread counts through all iterations and runs those that it claims. A claim adds 1 to an atomic counter,
 * so the next iteration goes to the next free thread. The main thread waits for the workers that have entered the
 * loop, not for those that are still asleep:
 *
 *   main thread   sets OPEN in `gate`; wakes sleeping workers; runs the loop; clears OPEN; waits until gate == 0
 *   worker        waits for OPEN; adds INSIDE to `gate`; runs the loop; clears OPEN, since no iteration is left to
 *                 claim; subtracts INSIDE
 *
 * A waiting thread spins for SPIN_SECONDS, about the time that a wake-up takes. Then it sleeps on a condition
 * variable. */
#include "engine/engine.h"

#ifdef _OPENMP

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static int created = 1;                     /* threads, the main one included */
static atomic_int used = 1;                 /* the first `used` of them run loops */
static _Thread_local int number;            /* of this thread; 0 is the main thread */
static _Thread_local atomic_size_t *claims; /* claimed iterations of the loop that this thread runs; NULL outside */

int threads_count(void) { return used; }

int thread_index(void) { return number; }

size_t thread_claim(void) { return atomic_fetch_add_explicit(claims, 1, memory_order_relaxed) + 1; }

/* ---------------------------------------------------------------- the loop, and the gate to it */

enum { OPEN = 1, INSIDE = 2 };        /* gate = OPEN, or 0, + INSIDE * (workers inside the loop) */
static _Alignas(64) atomic_uint gate; /* each of the three in a cache line of its own */
static _Alignas(64) atomic_size_t claimed;
static _Alignas(64) struct {
    void (*run)(void *);
    void *variables;
} loop;

static bool may_enter(void) { return (gate & OPEN) && number < used; }

static bool is_empty(void) { return gate == 0; }

static bool enter(void) {
    unsigned now = gate;
    while (now & OPEN)
        if (atomic_compare_exchange_weak(&gate, &now, now + INSIDE)) return true;
    return false;
}

/* ---------------------------------------------------------------- waiting */

#define SPIN_SECONDS 50e-6

/* A condition that threads wait for, and how many of them sleep. */
typedef struct {
    bool (*until)(void);
    pthread_cond_t changed;
    atomic_int asleep;
} Wait;
static Wait open_gate = {may_enter, PTHREAD_COND_INITIALIZER, 0}, empty_loop = {is_empty, PTHREAD_COND_INITIALIZER, 0};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void wait_for(Wait *wait) {
    if (wait->until()) return;
    for (double start = seconds(); seconds() - start < SPIN_SECONDS;)
        if (wait->until()) return;
    pthread_mutex_lock(&lock);
    wait->asleep++;
    while (!wait->until()) pthread_cond_wait(&wait->changed, &lock);
    wait->asleep--;
    pthread_mutex_unlock(&lock);
}

/* Called after the condition has become true. No wake-up is lost: a waiting thread adds itself to `asleep` before it
 * tests the condition for the last time. */
static void wake(Wait *wait) {
    if (!wait->asleep) return;
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&wait->changed);
    pthread_mutex_unlock(&lock);
}

/* ---------------------------------------------------------------- the two sides */

static void *work(void *own) {
    number = (int)(intptr_t)own;
    claims = &claimed;
    for (;;) {
        wait_for(&open_gate);
        if (!enter()) continue;
        if (number < used) { /* threads_set() may have lowered it meanwhile */
            loop.run(loop.variables);
            gate &= ~(unsigned)OPEN;
        }
        if (atomic_fetch_sub(&gate, INSIDE) == INSIDE) wake(&empty_loop);
    }
    return NULL;
}

/* Runs a nested loop, or any loop when one thread is used. */
static void run_alone(void (*run)(void *), void *variables) {
    atomic_size_t own = 0, *outer = claims;
    claims = &own;
    run(variables);
    claims = outer;
}

static void run_shared(void (*run)(void *), void *variables) {
    loop.run = run;
    loop.variables = variables;
    claimed = 0;
    gate = OPEN;
    wake(&open_gate);
    claims = &claimed;
    run(variables);
    claims = NULL;
    gate &= ~(unsigned)OPEN;
    wait_for(&empty_loop);
}

static void run_loop(void (*run)(void *), void *variables) {
    if (claims || used == 1) run_alone(run, variables);
    else run_shared(run, variables);
}

/* ---------------------------------------------------------------- entry points for gcc and clang */

#if !defined(__clang__)
void GOMP_parallel(void (*run)(void *), void *variables, unsigned threads, unsigned flags) {
    (void)threads, (void)flags;
    run_loop(run, variables);
}
#else
/* clang passes run() the addresses of two thread numbers, which this program does not use, then the address of each
 * variable of the loop. call() always passes MAX_VARIABLES of them. The calling conventions allow more arguments than
 * the function reads. */
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
    if (variables > MAX_VARIABLES)
        die(STATUS_RESOURCE, "a parallel loop has %d variables, expected at most %d (a bug)", variables, MAX_VARIABLES);
    va_start(arguments, run);
    for (int i = 0; i < variables; i++) c.v[i] = va_arg(arguments, void *);
    va_end(arguments);
    run_loop(call, &c);
}
#endif

/* ---------------------------------------------------------------- the number of threads */

int threads_default(void) {
    const char *variable = getenv("OMP_NUM_THREADS");
    int wanted = variable ? atoi(variable) : 0;
    return smaller(wanted > 0 ? wanted : processors_available(), MAX_THREADS);
}

/* A worker blocks all signals, so that only the main thread handles them. SIGBUS stays unblocked: the kernel sends it
 * to the thread that read the bad page. */
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
    enum { STACK = 1 << 20 }; /* musl's default of 128 KiB is too small */
    pthread_attr_t attributes;
    int error = 0;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (created < wanted && !(error = make_worker(created, &attributes))) created++;
    pthread_attr_destroy(&attributes);
    if (error)
        die(STATUS_RESOURCE, "cannot start %d threads, only %d: %s; set a lower --threads, or raise the limit on "
            "processes or memory", wanted, created, strerror(error));
    used = wanted;
}

#else

int threads_default(void) { return 1; }
void threads_set(int wanted) { (void)wanted; }
int threads_count(void) { return 1; }
int thread_index(void) { return 0; }

#endif
