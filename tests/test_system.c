/* test_system.c - system.c and threads.c: limits of groups, processors, on trees of files made here. */
#include "tests/test.h"
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static char *tree; /* the fake root */

/* Puts text into a file below the fake root. */
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
    put("/sys/fs/cgroup/user.slice/run.scope/memory.stat", "file 99999999\nanon 4194304\n");
    expect_memory("a scope of version 2", 60);

    begin("v2-parent", "0::/job_7/step_0\n"); /* as Slurm does */
    put("/sys/fs/cgroup/job_7/memory.max", "104857600\n");
    put("/sys/fs/cgroup/job_7/step_0/memory.max", "209715200\n");
    expect_memory("a parent's limit", 100);

    begin("v2-container", "0::/docker/0123\n"); /* the container's part of the tree is the root */
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
    expect_memory("a limit that is used up", 0);
}

static void expect_processors(const char *what, int count) {
    int found = processors_available();
    CHECK(found == count, "%s: %d processors, expected %d", what, found, count);
    system_root("");
    free(tree);
}

static void test_processors(void) {
    int cores = processors_available(); /* of this machine */
    begin("quota2", "0::/a/b\n");
    put("/sys/fs/cgroup/a/cpu.max", "50000 100000\n");
    put("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
    expect_processors("half a processor, version 2", 1);

    begin("quota1", "3:cpu,cpuacct:/x\n");
    put("/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "90000\n");
    put("/sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n");
    expect_processors("0.9 of a processor, version 1", 1);

    begin("no-quota", "0::/\n");
    put("/sys/fs/cgroup/cpu.max", "max 100000\n");
    for (int cpu = 0; cpu < 64; cpu++) { /* every processor a core of its own */
        char *path = format_string("/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        char *text = format_string("%d\n", cpu);
        put(path, text);
        free(path);
        free(text);
    }
    int alone = processors_available();
    CHECK(alone >= cores && alone >= 1, "%d processors without hyper-threads, %d cores", alone, cores);
    for (int cpu = 0; cpu < 64; cpu++) { /* two of each core, as Intel's servers number them */
        char *path = format_string("/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        char *text = format_string(cpu % 4 < 2 ? "%d-%d\n" : "%d,%d\n", cpu & ~1, cpu | 1);
        put(path, text);
        free(path);
        free(text);
    }
    if (alone == 2 || alone == 4) expect_processors("hyper-threads", alone / 2);
    else expect_processors("hyper-threads", processors_available());
}

void test_system(void) {
    test_memory_limits();
    test_processors();
}
