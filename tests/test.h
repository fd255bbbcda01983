/* test.h - the few lines that every suite uses. A suite is one function, listed in main.c; it calls CHECK for
 * everything it claims, and goes on after a failure, so that one run shows all that is wrong. */
#ifndef TEST_H
#define TEST_H

#include <stdbool.h>
#include <stddef.h>

/* Counts a claim; prints file, line and the message when it does not hold. */
#define CHECK(claim, ...) check((claim), __FILE__, __LINE__, __VA_ARGS__)
void check(bool claim, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* What follows runs under each table of kernels that this processor can run; `name` is the table's. */
#define FOR_TABLES(name)                                                                                     \
    for (int table_ = 0; kernels_known(table_); table_++)                                                    \
        for (const char *name = kernels_known(table_); name && !kernels_choose(name); name = NULL)

/* Largest difference over the largest magnitude of `expected`; infinite if anything is NaN. */
double relative_error(const float *actual, const float *expected, size_t n);

/* Runs a function in a process of its own, where it may die: its exit status, or 1000 + the signal that ended
 * it. `output` receives what it printed on standard error. */
int run_apart(void (*run)(void *), void *argument, char output[4096]);

/* Path of a file in a folder that exists only while the tests run; free() it. */
char *temporary_path(const char *name);

/* Path of a file below tests/; a static string that the next call overwrites. */
const char *test_path(const char *name);

#endif
