/* test.h - functions that the test suites share. A suite is one function, listed in main.c. It calls CHECK for each
 * claim and continues after a failure, so one run shows all failures. */
#ifndef TEST_H
#define TEST_H

#include <stdbool.h>
#include <stddef.h>

/* Counts a claim. If it is false, prints the file, the line and the message. */
#define CHECK(claim, ...) check((claim), __FILE__, __LINE__, __VA_ARGS__)
void check(bool claim, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* Runs the statement that follows once for each table of kernels that this processor supports; `name` is its name. */
#define FOR_TABLES(name)                                                                                     \
    for (int table_ = 0; kernels_known(table_); table_++)                                                    \
        for (const char *name = kernels_known(table_); name && !kernels_choose(name); name = NULL)

/* max |actual - expected| / max |expected|; infinite if any value is NaN. */
double relative_error(const float *actual, const float *expected, size_t n);

/* Runs a function in a child process, where it may call die(). Returns the exit status, or 1000 + the number of the
 * signal that killed it. `output` receives what it printed on standard error. */
int run_apart(void (*run)(void *), void *argument, char output[4096]);

/* The path of a file in a temporary folder, which is removed when the tests end; free() it. */
char *temporary_path(const char *name);

/* The path of a file in tests/. A static string that the next call overwrites. */
const char *test_path(const char *name);

#endif
