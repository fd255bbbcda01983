/* system.c - asks the operating system for the time, the available memory, the peak memory and the processors.
 *
 * Linux limits the memory and the processor time of containers and batch jobs with control groups (cgroups). Cgroups
 * form a tree. The limit of a process is the smallest limit of its cgroup and of all cgroups above it.
 * /proc/self/cgroup lists the cgroups of this process. There are two versions, and a machine may use both at once:
 *
 *   version             line in /proc/self/cgroup   file with the memory limit
 *   1: a tree for each  4:memory:/slurm/job_7       /sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes
 *      resource
 *   2: one tree         0::/user.slice/run.scope    /sys/fs/cgroup/user.slice/run.scope/memory.max
 *
 * A container often sees its own cgroup as the root of the tree. Then the folders of the path do not exist, and the
 * files in the root hold its limits. Therefore the root is always read too.
 *
 * Sources: man 7 cgroups; Linux Documentation/admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst. */
#include "engine/engine.h"

#include <math.h>
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

enum { LINE = 8192 };

/* Finds the first line that begins with `label` and copies the rest of it into `text`; false if there is none. */
static bool read_line(const char *folder, const char *file, const char *label, char text[LINE]) {
    char *path = format_string("%s%s/%s", root, folder, file);
    FILE *stream = fopen(path, "re");
    size_t length = strlen(label);
    bool found = false;
    free(path);
    while (stream && !found && fgets(text, LINE, stream)) found = !strncmp(text, label, length);
    if (stream) fclose(stream);
    if (found) memmove(text, text + length, strlen(text + length) + 1);
    return found;
}

static double read_number(const char *folder, const char *file, const char *label, double otherwise) {
    char text[LINE], *end;
    if (!read_line(folder, file, label, text)) return otherwise;
    double value = strtod(text, &end);
    return end > text ? value : otherwise;
}

/* ---------------------------------------------------------------- limits of cgroups */

/* The amount of a resource that a cgroup leaves to this process: bytes or processors; INFINITY if it has no limit.
 * `folder` is the cgroup's. */
typedef double Limit(const char *folder);

/* limit - (anonymous memory + shared memory). The page cache is not subtracted: the kernel can drop it. */

static double memory_version_1(const char *folder) {
    double limit = read_number(folder, "memory.limit_in_bytes", "", INFINITY); /* about 2^63: no limit */
    double anonymous = read_number(folder, "memory.stat", "total_rss ", 0);
    return limit - anonymous - read_number(folder, "memory.stat", "total_shmem ", 0);
}

static double memory_version_2(const char *folder) {
    double limit = read_number(folder, "memory.max", "", INFINITY); /* "max": no limit */
    double anonymous = read_number(folder, "memory.stat", "anon ", 0);
    return limit - anonymous - read_number(folder, "memory.stat", "shmem ", 0);
}

static double processors_version_1(const char *folder) {
    double quota = read_number(folder, "cpu.cfs_quota_us", "", -1); /* -1: no limit */
    return quota > 0 ? quota / read_number(folder, "cpu.cfs_period_us", "", 100000) : INFINITY;
}

static double processors_version_2(const char *folder) {
    char text[LINE];
    double quota, period; /* the file holds both, or "max" and the period */
    if (!read_line(folder, "cpu.max", "", text) || sscanf(text, "%lf %lf", &quota, &period) != 2) return INFINITY;
    return quota / period;
}

/* The smallest limit of the cgroup `group`, of the cgroups above it and of the root of `tree`. */
static double least_limit(const char *tree, const char *group, Limit *limit) {
    char *folder = format_string("%s%s", tree, group), *end = folder + strlen(folder), *top = folder + strlen(tree);
    double least = limit(tree);
    while (end > top) {
        least = fmin(least, limit(folder));
        while (*--end != '/') *end = 0;
        *end = 0;
    }
    free(folder);
    return least;
}

/* Whether the comma-separated list `names` contains `name`. */
static bool lists(const char *names, const char *name) {
    size_t length = strlen(name);
    for (; names; names = (names = strchr(names, ',')) ? names + 1 : NULL)
        if (!strncmp(names, name, length) && (!names[length] || names[length] == ',')) return true;
    return false;
}

/* The smallest limit in all cgroups of this process. `controller` is the name of the resource in version 1. */
static double group_limit(const char *controller, Limit *version_1, Limit *version_2) {
    char line[LINE], tree[64], *path = format_string("%s/proc/self/cgroup", root);
    FILE *stream = fopen(path, "re");
    double least = INFINITY;
    free(path);
    snprintf(tree, sizeof tree, "/sys/fs/cgroup/%s", controller);
    while (stream && fgets(line, sizeof line, stream)) { /* number:controllers:path of the cgroup */
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        group[strcspn(group, "\n")] = 0;
        if (!*++controllers) {
            least = fmin(least, least_limit("/sys/fs/cgroup", group, version_2));
            least = fmin(least, least_limit("/sys/fs/cgroup/unified", group, version_2)); /* beside version 1 */
        } else if (lists(controllers, controller)) {
            least = fmin(least, least_limit(tree, group, version_1));
        }
    }
    if (stream) fclose(stream);
    return least;
}

/* ---------------------------------------------------------------- memory */

/* MemAvailable, which Linux alone has, else the machine's memory; at most what the cgroups leave. */
size_t memory_available(void) {
    double machine = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    double available = 1024 * read_number("/proc", "meminfo", "MemAvailable:", machine / 1024);
    available = fmin(available, group_limit("memory", memory_version_1, memory_version_2));
    return machine <= 0 ? SIZE_MAX : available > 0 ? (size_t)available : 0;
}

/* Bytes of resident pages that no file backs. Mapped weights are left out: the kernel can drop and reread them. */
static size_t memory_private(void) {
    long resident = 0, shared = 0;
    FILE *status = fopen("/proc/self/statm", "r");
    if (!status) return 0;
    if (fscanf(status, "%*d %ld %ld", &resident, &shared) != 2) resident = shared = 0;
    fclose(status);
    return (size_t)(resident - shared) * (size_t)sysconf(_SC_PAGESIZE);
}

static size_t highest;

void memory_note(void) { highest = larger_size(highest, memory_private()); }

size_t memory_peak(void) {
    struct rusage usage;
    memory_note();
    if (highest > 0) return highest;
    getrusage(RUSAGE_SELF, &usage);
    return (size_t)usage.ru_maxrss * 1024;
}

/* ---------------------------------------------------------------- processors */

enum { MOST_PROCESSORS = 8192 };

/* Reads a list of processors such as "0-3,8" and marks them in `set`; false if there is no such line. */
static bool add_list(const char *folder, const char *file, const char *label, bool *set) {
    char text[LINE];
    if (!read_line(folder, file, label, text)) return false;
    int first, last, length;
    for (const char *at = text; sscanf(at, "%d%n", &first, &length) == 1; at += *at == ',') {
        at += length, last = first;
        if (sscanf(at, "-%d%n", &last, &length) == 1) at += length;
        for (int i = first; i >= 0 && i <= last && i < MOST_PROCESSORS; i++) set[i] = true;
    }
    return true;
}

/* The cores in this process's affinity mask that are online. The hyper-threads of a core count once: they share its
 * multipliers, so a second thread does not speed up a product. */
static int cores_allowed(void) {
    bool allowed[MOST_PROCESSORS] = {0}, online[MOST_PROCESSORS] = {0}, counted[MOST_PROCESSORS] = {0};
    int cores = 0;
    if (!add_list("/proc/self", "status", "Cpus_allowed_list:", allowed) ||
        !add_list("/sys/devices/system/cpu", "online", "", online))
        return (int)sysconf(_SC_NPROCESSORS_ONLN);
    for (int cpu = 0; cpu < MOST_PROCESSORS; cpu++) {
        char folder[64];
        if (!allowed[cpu] || !online[cpu] || counted[cpu]) continue;
        snprintf(folder, sizeof folder, "/sys/devices/system/cpu/cpu%d/topology", cpu);
        add_list(folder, "thread_siblings_list", "", counted);
        cores++;
    }
    return cores;
}

/* The quota is rounded up: one of 1.5 processors keeps two threads busy most of the time. */
int processors_available(void) {
    double quota = ceil(group_limit("cpu", processors_version_1, processors_version_2));
    return (int)fmax(1, fmin(quota, cores_allowed()));
}
