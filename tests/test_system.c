/* test_system.c - system.c on fake /proc and /sys folders: limits of cgroups, processors; and the loops of threads.c.
 * */
#include "tests/test.h"
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static char *tree; /* the folder that holds the fake /proc and /sys */

/* Writes a file below the fake root. */
static void put(const char *path, const char *text) {
    char *full = format_string("%s%s", tree, path), *slash = strrchr(full, '/');
    char *command = format_string("mkdir -p '%.*s'", (int)(slash - full), full);
    CHECK(!system(command), "%s failed", command);
    OutputFile out = output_open(full);
    output_write(&out, text, strlen(text));
    output_commit(&out);
    free(command);
    free(full);
}

static void begin(const char *name, const char *groups) {
    tree = temporary_path(name);
    system_root(tree);
    put("/proc/meminfo", "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n");
    put("/proc/self/cgroup", groups);
}

static void expect_memory(const char *what, double mib) {
    double found = (double)memory_available() / 1048576;
    CHECK(fabs(found - mib) < 0.01, "%s: %.2f MiB available, expected %.2f", what, found, mib);
    system_root("");
    free(tree);
}

static void test_memory_limits(void) {
    begin("none", "0::/\n");
    expect_memory("no limit", 8000000 / 1024.0);

    begin("v2", "0::/user.slice/run.scope\n"); /* as systemd-run --scope makes it */
    put("/sys/fs/cgroup/user.slice/memory.max", "max\n");
    put("/sys/fs/cgroup/user.slice/run.scope/memory.max", "67108864\n");
    put("/sys/fs/cgroup/user.slice/run.scope/memory.stat", "file 99999999\nanon 3145728\nshmem 1048576\n");
    expect_memory("a scope of version 2", 60);

    begin("v2-parent", "0::/job_7/step_0\n"); /* as Slurm does */
    put("/sys/fs/cgroup/job_7/memory.max", "104857600\n");
    put("/sys/fs/cgroup/job_7/step_0/memory.max", "209715200\n");
    expect_memory("a parent's limit", 100);

    begin("v2-container", "0::/docker/0123\n"); /* the container sees its own cgroup as the root */
    put("/sys/fs/cgroup/memory.max", "52428800\n");
    expect_memory("a container's root", 50);

    begin("v1", "5:cpu,cpuacct:/\n4:memory:/slurm/job_7\n0::/\n");
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    put("/sys/fs/cgroup/memory/slurm/memory.limit_in_bytes", "134217728\n");
    put("/sys/fs/cgroup/memory/slurm/memory.stat", "rss 1\ntotal_rss 1048576\n");
    put("/sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes", "9223372036854771712\n");
    expect_memory("a parent in version 1", 127);

    begin("used-up", "0::/a\n");
    put("/sys/fs/cgroup/a/memory.max", "1048576\n");
    put("/sys/fs/cgroup/a/memory.stat", "anon 2097152\n");
    expect_memory("an exhausted limit", 0);
}

/* A machine of 8 processors. `siblings`: "" one hyper-thread a core; "-" a core is 0-1, as on AMD; "," a core is 0,4,
 * as on Intel servers. */
static void begin_processors(const char *name, const char *groups, const char *allowed, const char *siblings) {
    begin(name, groups);
    char *status = format_string("Name:\tsora\nCpus_allowed:\tff\nCpus_allowed_list:\t%s\n", allowed);
    put("/proc/self/status", status);
    put("/sys/devices/system/cpu/online", "0-7\n");
    for (int cpu = 0; cpu < 8; cpu++) {
        bool adjacent = !strcmp(siblings, "-");
        char *path = format_string("/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu),
             *list = *siblings ? format_string("%d%s%d\n", adjacent ? cpu & ~1 : cpu & 3, siblings,
                                               adjacent ? cpu | 1 : cpu | 4)
                               : format_string("%d\n", cpu);
        put(path, list);
        free(path), free(list);
    }
    free(status);
}

static void expect_processors(const char *what, int count) {
    int found = processors_available();
    CHECK(found == count, "%s: %d processors, expected %d", what, found, count);
    system_root("");
    free(tree);
}

static void test_processors(void) {
    begin_processors("cores", "0::/\n", "0-7", "");
    expect_processors("eight cores", 8);
    begin_processors("offline", "0::/\n", "0-63", "");
    expect_processors("eight cores, affinity mask of 64", 8);
    begin_processors("affinity", "0::/\n", "1,4-5,7", "");
    expect_processors("four of eight cores", 4);
    begin_processors("adjacent", "0::/\n", "0-7", "-");
    expect_processors("four cores of two hyper-threads", 4);
    begin_processors("split", "0::/\n", "0-7", ",");
    expect_processors("four cores of two hyper-threads, numbered 0,4", 4);
    begin_processors("one-each", "0::/\n", "1,3,5", "-");
    expect_processors("three cores, one hyper-thread of each", 3);

    begin_processors("quota2", "0::/a/b\n", "0-7", "");
    put("/sys/fs/cgroup/a/cpu.max", "250000 100000\n");
    put("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
    expect_processors("two and a half processors, version 2", 3);
    begin_processors("quota2-own", "0::/a/b\n", "0-7", "-");
    put("/sys/fs/cgroup/a/cpu.max", "600000 100000\n");
    put("/sys/fs/cgroup/a/b/cpu.max", "50000 100000\n");
    expect_processors("half a processor, version 2", 1);
    begin_processors("quota1", "6:cpuset:/\n3:cpuacct,cpu:/x/y\n", "0-7", "");
    put("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
    put("/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "400000\n");
    put("/sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "200000\n");
    put("/sys/fs/cgroup/cpu/x/y/cpu.cfs_quota_us", "-1\n");
    expect_processors("two processors, version 1", 2);
    begin_processors("quota-more", "0::/\n", "0-1", "");
    put("/sys/fs/cgroup/cpu.max", "900000 100000\n");
    expect_processors("a quota above the number of processors", 2);
}

/* ---------------------------------------------------------------- threads */

/* Each iteration must run exactly once, for any loop header and any number of threads, also in nested loops.
 * thread_index() must be below threads_count(). */
enum { OUTER = 50, INNER = 40 };
static void test_loops(void) {
    int before = threads_count();
    for (int threads = 1; threads <= 5; threads++) {
        static int runs[OUTER][INNER], by[16];
        bool once = true;
        threads_set(threads);
        memset(runs, 0, sizeof runs);
        for (int again = 0; again < 200; again++)
            PARALLEL_FOR (int i = 0; i < OUTER; i++) {
                if (i % 7 == 0) continue;
                PARALLEL_FOR (int j = INNER - 1; j >= 0; j -= 3) runs[i][j]++;
                by[thread_index()]++;
            }
        for (int i = 0; i < OUTER; i++)
            for (int j = 0; j < INNER; j++) once &= runs[i][j] == 200 * (i % 7 && j % 3 == 0);
        CHECK(once, "%d threads: an iteration did not run exactly once", threads);
        for (int t = threads_count(); t < 16; t++)
            CHECK(by[t] == 0, "%d threads: thread %d ran iterations", threads, t);
        PARALLEL_FOR (int i = 0; i < 0; i++) once = false;
        CHECK(once, "%d threads: an empty loop ran an iteration", threads);
        memset(by, 0, sizeof by);
    }
    threads_set(before);
}

void test_system(void) {
    test_memory_limits();
    test_processors();
    test_loops();
}
