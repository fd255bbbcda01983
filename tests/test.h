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

/* Largest difference over the largest magnitude of `expected`; infinite if anything is not a number. */
double relative_error(const float *actual, const float *expected, size_t n);

/* Path of a file below tests/; a static string that the next call overwrites. */
const char *test_path(const char *name);

#endif
