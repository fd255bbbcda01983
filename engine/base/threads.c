/* threads.c - how many threads there are, and how they wait.
 *
 * Loops marked PARALLEL_FOR are shared out by OpenMP, whose threads meet at the end of each. Whoever is early spins,
 * then sleeps. Runtimes spin for milliseconds: alone that saves microseconds a loop, but on a core that somebody else
 * needs it holds up the very thread that is waited for, in thousands of loops a clip. So they are told to spin for less
 * than it takes to wake up. GNU's runtime takes this from the environment alone, and before main() begins: the program
 * sets it and starts itself again, once. Whoever sets one of the variables is left alone. */
#include "engine/engine.h"

#ifdef _OPENMP

#include <omp.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const variables[][2] = {
    {"GOMP_SPINCOUNT", "2500"}, /* GNU: rounds of some 20 to 50 ns */
    {"KMP_BLOCKTIME", "0"},     /* LLVM: milliseconds */
};

void threads_wait_briefly(char **argv) {
    enum { COUNT = sizeof variables / sizeof *variables };
    if (getenv("OMP_WAIT_POLICY")) return;
    for (int i = 0; i < COUNT; i++)
        if (getenv(variables[i][0])) return; /* the user's choice, or this program's own */
    for (int i = 0; i < COUNT; i++)
        if (setenv(variables[i][0], variables[i][1], 0)) return;
    execv("/proc/self/exe", argv); /* where it cannot, the run goes on, and waits as the runtime does */
}

void threads_set(int count) { omp_set_num_threads(count); }

int threads_count(void) { return omp_get_max_threads(); }

int thread_index(void) { return omp_get_thread_num(); }

void threads_default(void) {
    if (!getenv("OMP_NUM_THREADS")) omp_set_num_threads(processors_available());
}

static void *hold(void *gate) {
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

/* OpenMP would end the program with a message of its own. All are held, so that they exist at once. */
static void try_threads(int count) {
    pthread_t *threads = allocate(sizeof *threads * (size_t)count);
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    int made = 0, error = 0;
    pthread_mutex_lock(&gate);
    while (made < count && !(error = pthread_create(&threads[made], NULL, hold, &gate))) made++;
    pthread_mutex_unlock(&gate);
    for (int i = 0; i < made; i++) pthread_join(threads[i], NULL);
    free(threads);
    if (error)
        die(STATUS_RESOURCE, "%d threads cannot be had: %s after %d; a limit on processes (ulimit -u, pids.max)? "
            "--threads %d asks for fewer", count + 1, strerror(error), made + 1, made + 1);
}

void threads_start(void) {
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS); /* comes to whoever reads the page */
    pthread_sigmask(SIG_BLOCK, &all, &before); /* threads inherit it */
    try_threads(threads_count() - 1);
#pragma omp parallel
    if (omp_get_thread_num()) pthread_sigmask(SIG_BLOCK, &all, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

#else

void threads_wait_briefly(char **argv) { (void)argv; }
void threads_set(int count) { (void)count; }
int threads_count(void) { return 1; }
int thread_index(void) { return 0; }
void threads_default(void) {}
void threads_start(void) {}

#endif
