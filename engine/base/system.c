/* system.c - what the operating system gives: time, memory, processors.
 *
 * A container or a batch job may have less than the machine: Linux limits a group of processes, groups lie in groups,
 * and the tightest limit on the way up counts. /proc/self/cgroup says where a process is. There are two generations:
 *
 *   version 1   a tree for each resource:  5:memory:/slurm/job_7    /sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes
 *   version 2   one tree for all:          0::/user.slice/run.scope /sys/fs/cgroup/user.slice/run.scope/memory.max
 *
 * Both may be there at once. A container often shows only its own part of the tree, as the root; then the path's
 * groups are missing, and the root's files are what it may have. */
#define _GNU_SOURCE /* sched_getaffinity */
#include "engine/engine.h"

#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---------------------------------------------------------------- small text files */

static const char *root = "";

void system_root(const char *path) { root = path; }

/* The file of that name below the root; NULL if there is none. */
static FILE *open_below_root(const char *path) {
    char *full = format_string("%s%s", root, path);
    FILE *stream = fopen(full, "re");
    free(full);
    return stream;
}

/* The number after `label` at the start of a line; `fallback` if there is none. */
static double read_number(const char *path, const char *label, double fallback) {
    FILE *stream = open_below_root(path);
    if (!stream) return fallback;
    char line[256];
    double value = fallback;
    size_t length = strlen(label);
    while (fgets(line, sizeof line, stream))
        if (!strncmp(line, label, length) && sscanf(line + length, "%lf", &value) == 1) break;
    fclose(stream);
    return value;
}

/* ---------------------------------------------------------------- groups */

/* What is still to be had of a resource in one group's folder; INFINITY if it sets no limit. */
typedef double Limit(const char *folder);

static double read_in(const char *folder, const char *file, const char *label, double fallback) {
    char *path = format_string("%s/%s", folder, file);
    double value = read_number(path, label, fallback);
    free(path);
    return value;
}

static double memory_version_2(const char *folder) {
    return read_in(folder, "memory.max", "", INFINITY) - read_in(folder, "memory.stat", "anon ", 0);
}

static double memory_version_1(const char *folder) {
    double limit = read_in(folder, "memory.limit_in_bytes", "", INFINITY); /* 2^63 or a little less: none */
    return limit > 0x1p62 ? INFINITY : limit - read_in(folder, "memory.stat", "total_rss ", 0);
}

static double processors_version_2(const char *folder) {
    char *path = format_string("%s/cpu.max", folder);
    FILE *stream = open_below_root(path);
    double quota, period, processors = INFINITY;
    if (stream && fscanf(stream, "%lf %lf", &quota, &period) == 2 && period > 0) processors = quota / period; /* else "max" */
    if (stream) fclose(stream);
    free(path);
    return processors;
}

static double processors_version_1(const char *folder) {
    double quota = read_in(folder, "cpu.cfs_quota_us", "", -1), period = read_in(folder, "cpu.cfs_period_us", "", 0);
    return quota > 0 && period > 0 ? quota / period : INFINITY;
}

/* The least of a limit from the group `path` in a tree up to the tree's root. */
static double least_on_the_way_up(const char *tree, char *path, Limit *limit) {
    double least = INFINITY;
    for (;;) {
        char *folder = format_string("%s%s", tree, strcmp(path, "/") ? path : "");
        double here = limit(folder);
        if (here < least) least = here;
        free(folder);
        char *slash = strrchr(path, '/');
        if (!slash || !*path) return least;
        *slash = 0;
    }
}

/* Whether a list of names parted by commas has one. */
static bool lists(const char *names, const char *name) {
    size_t length = strlen(name);
    for (const char *at = names; (at = strstr(at, name)); at += length)
        if ((at == names || at[-1] == ',') && (!at[length] || at[length] == ',')) return true;
    return false;
}

/* The least of a resource's limits in all groups that this process is in. `controller`: its name in version 1. */
static double group_limit(const char *controller, Limit *version_1, Limit *version_2) {
    FILE *stream = open_below_root("/proc/self/cgroup");
    char line[4096];
    double least = INFINITY;
    while (stream && fgets(line, sizeof line, stream)) {
        char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path) continue;
        controllers++;
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        double here = INFINITY;
        if (!*controllers) {
            char *again = format_string("%s", path);
            double hybrid = least_on_the_way_up("/sys/fs/cgroup/unified", again, version_2);
            here = least_on_the_way_up("/sys/fs/cgroup", path, version_2);
            if (hybrid < here) here = hybrid;
            free(again);
        } else if (lists(controllers, controller)) {
            char *tree = format_string("/sys/fs/cgroup/%s", controller);
            here = least_on_the_way_up(tree, path, version_1);
            free(tree);
        }
        if (here < least) least = here;
    }
    if (stream) fclose(stream);
    return least;
}

/* ---------------------------------------------------------------- memory */

/* Resident pages that no file backs: the mapped weights do not count, they can be had again at any time. */
static size_t memory_private(void) {
    long resident = 0, shared = 0;
    FILE *status = fopen("/proc/self/statm", "r");
    if (!status) return 0;
    if (fscanf(status, "%*d %ld %ld", &resident, &shared) != 2) resident = shared = 0;
    fclose(status);
    return (size_t)(resident - shared) * (size_t)sysconf(_SC_PAGESIZE);
}

static size_t highest;

void memory_note(void) {
    size_t now = memory_private();
    if (now > highest) highest = now;
}

size_t memory_available(void) {
    double pages = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    double machine = 1024 * read_number("/proc/meminfo", "MemAvailable:", pages / 1024);
    double group = group_limit("memory", memory_version_1, memory_version_2);
    double available = group < machine ? group : machine;
    return available > 0 ? (size_t)available : pages > 0 ? 0 : SIZE_MAX;
}

size_t memory_peak(void) {
    struct rusage usage;
    memory_note();
    if (highest > 0) return highest;
    getrusage(RUSAGE_SELF, &usage);
    return (size_t)usage.ru_maxrss * 1024;
}

/* ---------------------------------------------------------------- processors */

/* Two processors of one core share its multipliers: a second thread there adds nothing to products. A core counts
 * once, by the first of its processors that this process may run on. */
static int cores_allowed(void) {
    enum { MOST = 4096 };
    static uint8_t allowed[MOST], counted[MOST];
    cpu_set_t *set = CPU_ALLOC(MOST);
    size_t bytes = CPU_ALLOC_SIZE(MOST);
    int cores = 0;
    if (!set || sched_getaffinity(0, bytes, set)) return CPU_FREE(set), (int)sysconf(_SC_NPROCESSORS_ONLN);
    for (int cpu = 0; cpu < MOST; cpu++) allowed[cpu] = CPU_ISSET_S(cpu, bytes, set) != 0, counted[cpu] = 0;
    CPU_FREE(set);
    for (int cpu = 0; cpu < MOST; cpu++) {
        if (!allowed[cpu] || counted[cpu]) continue;
        cores++;
        char *path = format_string("/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu), comma;
        FILE *stream = open_below_root(path);
        int first, last; /* "0,64" or "0-1" */
        while (stream && fscanf(stream, "%d", &first) == 1) {
            last = first;
            if (fscanf(stream, "-%d", &last) < 0) last = first;
            for (int sibling = first; sibling <= last && sibling < MOST; sibling++)
                if (sibling >= 0) counted[sibling] = 1;
            if (fscanf(stream, "%c", &comma) != 1 || comma != ',') break;
        }
        if (stream) fclose(stream);
        free(path);
    }
    return cores;
}

int processors_available(void) {
    double quota = group_limit("cpu", processors_version_1, processors_version_2);
    int cores = cores_allowed();
    if (quota < cores) cores = (int)(quota + 0.99); /* 1.5 processors keep two threads busy most of the time */
    return cores > 1 ? cores : 1;
}
