/* test_faults.c - a run that is killed at any moment, or whose disk is full at any moment, resumes to the same bytes.
 *
 * $SORA writes a state after every step here (SORA_STATE_SECONDS=0). tests/shim.c, which is loaded into it
 * (LD_PRELOAD), counts its calls that write, rename or remove a file. A fault hits one of them, so that every gap
 * between two calls can be tried. Other kills come after a random time. After each fault the run is finished, by
 * --resume where there is a state. Then video and record must have the bytes of an undisturbed run, and nothing else
 * may be left.
 *
 * FAULTS=N asks for N kills and 3/4 N full disks, spread over all calls of all clips; the default takes seconds. */
#include "tests/test.h"
#include "engine/engine.h"
#include "sora.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    const char *name, *arguments[24];
} Clip;

static const Clip clips[] = {
    {"whole", {"-m", "tests/goldens/model/model.gguf", "-s", "32x16", "-f", "13", "--steps", "5", "-g", "3",
               "--shift", "3", "--seed", "7", "a red fox", NULL}},
    {"chunks", {"-m", "tests/goldens/causal/model.gguf", "-s", "16x16", "-f", "33", "--window", "6", "--sink", "1",
                "--seed", "7", "--drift", "--mark", "--at", "1 a dog", "a red fox", NULL}},
    {"extended", {"-m", "tests/goldens/causal/model.gguf", "-s", "48x32", "--video", "tests/goldens/images/clip.y4m",
                  "--extend", "-f", "16", "--window", "6", "--seed", "7", "a red fox", NULL}},
    {"anew", {"-m", "tests/goldens/model/model.gguf", "--video", "tests/goldens/images/clip.y4m", "--strength", "0.8",
              "--steps", "4", "-g", "3", "--shift", "3", "--seed", "7", "a red fox", NULL}},
    {"pictures", {"-m", "tests/goldens/pictures/model.gguf", "-s", "32x16", "-f", "13",
                  "--image", "tests/goldens/pictures/first.y4m", "--last-image", "tests/goldens/pictures/last.y4m",
                  "--steps", "4", "-g", "3", "--guidance-2", "2", "--shift", "3", "--seed", "7", "a red fox", NULL}},
    {"from the last frame", {"-m", "tests/goldens/pictures/model.gguf", "--video", "tests/goldens/images/clip.y4m",
                             "--extend", "-f", "16", "--steps", "2", "-g", "3", "--shift", "3", "--seed", "7",
                             "a red fox", NULL}},
    {"easycache", {"-m", "tests/goldens/model/model.gguf", "-s", "32x16", "-f", "5", "--steps", "14", "-g", "3",
                   "--shift", "3", "--easycache", "10", "--seed", "7", "a red fox", NULL}},
    {"tiny", {"-m", "tests/goldens/tiny/model.gguf", "-s", "32x16", "-f", "17", "--steps", "2", "-g", "1",
              "--decoder", "tiny", "--seed", "7", "a red fox", NULL}},
    {"bundled", {"-m", "models/demo.gguf", "-s", "48x48", "-f", "9", "--steps", "4", "--seed", "1", "--label",
                 "a blue star bounces on the grass", NULL}},
};
enum { CLIPS = sizeof clips / sizeof *clips };

static const char *sora, *shim;
static char *folder;
static char expected[CLIPS][2][65]; /* SHA-256 of video and record */
static int kills, resumes;
static struct { int before, sampling, saving, decoding, after; } killed;

static char *in_folder(const char *name) { return format_string("%s/%s", folder, name); }

static bool exists(const char *name) {
    char *path = in_folder(name);
    bool there = !access(path, F_OK);
    free(path);
    return there;
}

static size_t size_of(const char *name) {
    struct stat status;
    char *path = in_folder(name);
    size_t size = stat(path, &status) ? 0 : (size_t)status.st_size;
    free(path);
    return size;
}

static void clear(void) {
    DIR *dir = opendir(folder);
    for (struct dirent *entry; dir && (entry = readdir(dir));)
        if (entry->d_name[0] != '.') unlinkat(dirfd(dir), entry->d_name, 0);
    if (dir) closedir(dir);
}

static int count_files(void) {
    DIR *dir = opendir(folder);
    int count = 0;
    for (struct dirent *entry; dir && (entry = readdir(dir));) count += entry->d_name[0] != '.';
    if (dir) closedir(dir);
    return count;
}

/* ---------------------------------------------------------------- running the program */

typedef struct {
    const char *fault; /* NULL: none */
    long at;
    const char *count; /* file for the number of calls */
    size_t memory;     /* limit on address space; 0: none */
    bool clock, nobody;
} Disturbance;

static void set_number(const char *name, long value) {
    char text[24];
    snprintf(text, sizeof text, "%ld", value);
    setenv(name, text, 1);
}

/* Starts the program; its standard error goes to the file "err". */
static pid_t start(const Clip *clip, bool resume, Disturbance d) {
    char *output = in_folder("clip.y4m"), *err = format_string("%s.err", folder);
    const char *arguments[40] = {sora, "-q", "-t", "1", "-o", output};
    int n = 6;
    if (resume) arguments[n++] = "--resume";
    for (int i = 0; !resume && clip->arguments[i]; i++) arguments[n++] = clip->arguments[i];
    pid_t child = fork();
    if (!child) {
        setenv("SORA_STATE_SECONDS", "0", 1);
        if (d.fault || d.count || d.clock) setenv("LD_PRELOAD", shim, 1);
        if (d.fault) setenv("FAULT", d.fault, 1), set_number("FAULT_AT", d.at);
        if (d.count) setenv("FAULT_COUNT", d.count, 1);
        if (d.clock) setenv("FAULT_CLOCK", "1", 1);
        if (d.memory) setrlimit(RLIMIT_AS, &(struct rlimit){d.memory, d.memory});
        int file = open(err, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (dup2(file, STDERR_FILENO) < 0 || (d.nobody && (setgid(65534) || setuid(65534)))) _exit(99);
        signal(SIGINT, SIG_DFL);
        execv(sora, (char **)arguments);
        _exit(99);
    }
    free(output), free(err);
    return child;
}

static int ended(pid_t child) {
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static int run(const Clip *clip, bool resume, Disturbance d) { return ended(start(clip, resume, d)); }

/* What the program said: how many lines, warnings and reports of --drift apart, and the last of them. */
static int said(char last[1024]) {
    char *path = format_string("%s.err", folder), line[1024];
    FILE *file = fopen(path, "r");
    int lines = 0;
    *last = 0;
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, "sora: ", 6) && strncmp(line, "sora: warning: ", 15)) lines++, strcpy(last, line);
    if (file) fclose(file);
    free(path);
    return lines;
}

static void digest(const char *name, char hex[65]) {
    Bytes bytes;
    char *path = in_folder(name);
    *hex = 0;
    if (!read_file(path, (size_t)1 << 28, &bytes)) sha256_of(bytes.data, bytes.size, hex);
    free((void *)bytes.data);
    free(path);
}

/* Whether video and record are those of an undisturbed run, and alone. */
static bool is_complete(int clip) {
    char video[65], record[65];
    digest("clip.y4m", video), digest("clip.y4m.json", record);
    return !strcmp(video, expected[clip][0]) && !strcmp(record, expected[clip][1]) && count_files() == 2;
}

/* What a run that was stopped needs: nothing, to go on, or to begin anew. Returns its status. */
static int finish(int clip) {
    if (exists("clip.y4m.state")) {
        resumes++;
        return run(&clips[clip], true, (Disturbance){0});
    }
    return is_complete(clip) ? 0 : run(&clips[clip], false, (Disturbance){0});
}

static void note_kill(void) {
    kills++;
    if (exists("clip.y4m.state.part")) killed.saving++;
    else if (exists("clip.y4m")) killed.after++;
    else if (size_of("clip.y4m.part")) killed.decoding++;
    else if (exists("clip.y4m.state")) killed.sampling++;
    else killed.before++;
}

/* ---------------------------------------------------------------- the faults */

static long count_calls(int clip) {
    char *path = format_string("%s.calls", folder);
    Bytes bytes;
    clear();
    run(&clips[clip], false, (Disturbance){.count = path});
    long calls = read_file(path, 64, &bytes) ? 0 : atol((const char *)bytes.data);
    free((void *)bytes.data);
    free(path);
    return calls;
}

static void kill_at(int clip, const char *fault, long at) {
    clear();
    int status = run(&clips[clip], false, (Disturbance){.fault = fault, .at = at});
    CHECK(status == 1000 + SIGKILL || (!strcmp(fault, "torn") && status == 0), "%s, %s at call %ld: status %d",
          clips[clip].name, fault, at, status);
    if (status == 1000 + SIGKILL) note_kill();
    status = finish(clip);
    CHECK(status == 0 && is_complete(clip), "%s, %s at call %ld: ends with status %d, %d files, or other bytes",
          clips[clip].name, fault, at, status, count_files());
}

static void fill_at(int clip, long at) {
    char last[1024];
    clear();
    int status = run(&clips[clip], false, (Disturbance){.fault = "full", .at = at}), lines = said(last);
    bool stated = exists("clip.y4m.state");
    if (status == 0 && is_complete(clip)) return; /* the last calls rename and remove, which takes no space */
    CHECK(status == 3 && lines == 1 && (strstr(last, "No space left") || strstr(last, "complete")),
          "%s, full at call %ld: status %d, %d lines: %s", clips[clip].name, at, status, lines, last);
    CHECK(stated == !!strstr(last, "to resume: sora --resume"), "%s, full at call %ld: %s", clips[clip].name, at, last);
    CHECK(stated || exists("clip.y4m") || strstr(last, "complete") || count_files() == 0,
          "%s, full at call %ld: %d files are left", clips[clip].name, at, count_files());
    status = finish(clip);
    CHECK(status == 0 && is_complete(clip), "%s, full at call %ld: ends with status %d, %d files, or other bytes",
          clips[clip].name, at, status, count_files());
}

/* Killed after a random time, again and again until it is done. */
static void kill_at_random(int clip, double longest, int most) {
    int status = 1;
    clear();
    for (int i = 0; i < most && status; i++) {
        bool resume = exists("clip.y4m.state");
        if (!resume && is_complete(clip)) break;
        resumes += resume;
        pid_t child = start(&clips[clip], resume, (Disturbance){0});
        double wait = longest * rand() / RAND_MAX;
        nanosleep(&(struct timespec){(time_t)wait, (long)((wait - (double)(time_t)wait) * 1e9)}, NULL);
        kill(child, SIGKILL);
        status = ended(child);
        if (status == 1000 + SIGKILL) note_kill();
        CHECK(status == 1000 + SIGKILL || status == 0, "%s, killed at random: status %d", clips[clip].name, status);
    }
    status = finish(clip);
    CHECK(status == 0 && is_complete(clip), "%s, killed at random: ends with status %d, %d files, or other bytes",
          clips[clip].name, status, count_files());
}

static void other_faults(int clip) {
    char last[1024];
    clear();
    pid_t child = start(&clips[clip], false, (Disturbance){.clock = shim != NULL});
    nanosleep(&(struct timespec){0, 50000000}, NULL);
    kill(child, SIGSTOP);
    nanosleep(&(struct timespec){0, 50000000}, NULL);
    kill(child, SIGCONT);
    int status = ended(child);
    CHECK(status == 0 && is_complete(clip), "%s, stopped, with a clock that goes back: status %d", clips[clip].name,
          status);
    /* Without the shim this may be a sanitizer's build, which takes all address space. */
    for (size_t mebibytes = 8; shim && mebibytes <= 72; mebibytes += 16) {
        clear();
        status = run(&clips[clip], false, (Disturbance){.memory = mebibytes << 20});
        int lines = said(last);
        CHECK(status == 0 || status == 99 || status == 127 || status >= 1000 || (status <= 3 && lines == 1),
              "%s in %zu MiB: status %d, %d lines: %s", clips[clip].name, mebibytes, status, lines, last);
        status = finish(clip);
        CHECK(status == 0 && is_complete(clip), "%s in %zu MiB, then in more: status %d", clips[clip].name, mebibytes,
              status);
    }
}

/* A run of some seconds, which is stopped (SIGSTOP) once it has a state. */
static pid_t start_long(Clip *clip, const char *model) {
    *clip = clips[0];
    clip->arguments[1] = model, clip->arguments[7] = "600"; /* steps */
    clear();
    pid_t child = start(clip, false, (Disturbance){0});
    for (int i = 0; i < 20000 && !exists("clip.y4m.state"); i++) nanosleep(&(struct timespec){0, 1000000}, NULL);
    kill(child, SIGSTOP);
    return child;
}

/* A folder that may not be written, and one that is removed meanwhile. */
static void folders(void) {
    char last[1024], *gone = format_string("%s.gone", folder);
    Clip clip;
    clear();
    chmod(folder, 0555);
    int status = run(&clips[0], false, (Disturbance){.nobody = geteuid() == 0}), lines = said(last);
    chmod(folder, 0755);
    CHECK(status == 99 || (status == 3 && lines == 1 && strstr(last, "clip.y4m: cannot write: Permission denied")),
          "a folder that may not be written: status %d, %d lines: %s", status, lines, last);
    pid_t child = start_long(&clip, clips[0].arguments[1]);
    rename(folder, gone);
    kill(child, SIGCONT);
    status = ended(child), lines = said(last);
    CHECK(status == 3 && lines == 1 && strstr(last, "clip.y4m: cannot write: No such file"),
          "a folder that is gone: status %d, %d lines: %s", status, lines, last);
    rename(gone, folder);
    CHECK(run(&clip, true, (Disturbance){0}) == 0 && exists("clip.y4m") && count_files() == 2,
          "a folder that is there again");
    free(gone);
}

/* A model that is replaced while it is read does no harm; one that is written to ends the run. */
static void models(void) {
    Bytes model;
    char last[1024], *path = format_string("%s.gguf", folder), *other = format_string("%s.other", folder);
    if (read_file("tests/goldens/model/model.gguf", (size_t)1 << 24, &model)) return;
    for (int replaced = 0; replaced < 2; replaced++) {
        Clip clip;
        FILE *file = fopen(path, "wb");
        CHECK(file && fwrite(model.data, 1, model.size, file) == model.size && !fclose(file), "no model");
        pid_t child = start_long(&clip, path);
        file = fopen(replaced ? other : path, replaced ? "wb" : "r+b");
        if (file) fputs("GGUF", file), fclose(file);
        if (replaced) rename(other, path);
        kill(child, SIGCONT);
        int status = ended(child), lines = said(last);
        if (replaced) CHECK(status == 0 && exists("clip.y4m"), "a model that is replaced: status %d: %s", status, last);
        else CHECK(status == 2 && lines == 1 && strstr(last, "written to while"),
                   "a model that is written to: status %d: %s", status, last);
    }
    free((void *)model.data), free(path), free(other);
}

static void expect(int clip) {
    clear();
    int status = run(&clips[clip], false, (Disturbance){0});
    digest("clip.y4m", expected[clip][0]), digest("clip.y4m.json", expected[clip][1]);
    CHECK(status == 0 && count_files() == 2, "%s: status %d, %d files", clips[clip].name, status, count_files());
}

void test_faults(void) {
    const char *wanted = getenv("FAULTS");
    int faults = wanted ? atoi(wanted) : 12, in_order = faults * 3 / 4;
    sora = getenv("SORA"), shim = getenv("SHIM");
    if (!sora) sora = "./sora";
    if (shim && access(shim, R_OK)) shim = NULL; /* it could not be compiled */
    srand((unsigned)time(NULL));
    folder = temporary_path("faults");
    char *slash = strrchr(folder, '/');
    *slash = 0, chmod(folder, 0755), *slash = '/';
    if (mkdir(folder, 0755)) abort();
    for (int c = 0; c < CLIPS; c++) expect(c);
    long calls[CLIPS], all = 0;
    for (int c = 0; c < CLIPS; c++) all += calls[c] = shim ? count_calls(c) : 0;
    if (!all) printf("no calls can be counted: kills come at random only\n");
    long step = all / in_order + 1, at = 1 + rand() % step;
    for (int c = 0; c < CLIPS; at -= calls[c], c++)
        for (; at <= calls[c]; at += step) {
            kill_at(c, at / step % 4 ? "kill" : "torn", at);
            fill_at(c, at);
        }
    while (kills < faults) kill_at_random(kills % CLIPS, 0.3, 12);
    for (int c = 0; c < CLIPS - (wanted == NULL); c++) other_faults(c);
    folders();
    models();
    if (wanted)
        printf("%d kills: %d before a state, %d in sampling, %d while a state is written, %d in decoding, %d after the "
               "video has its name; %d resumes; %ld calls\n", kills, killed.before, killed.sampling, killed.saving,
               killed.decoding, killed.after, resumes, all);
    free(folder);
}
