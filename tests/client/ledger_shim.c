/* Stands between a process and the file system (LD_PRELOAD) for files below $SHIM_ROOT.
 *
 * It writes every operation that changes something, with its bytes, to a log; and it can make the n-th
 * operation from now fail, stop half way, or kill the process before or after it. Real calls go straight
 * to the kernel, so nothing here depends on the C library's own wrappers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PASS = 0, FAIL = 1, SHORT = 2, KILL_BEFORE = 3, KILL_AFTER = 4 };
enum { MAX_FD = 4096 };

static char is_ours[MAX_FD];
static int log_fd = -1;
static long countdown = 0; /* 0: not armed */
static int mode = PASS, error_number = 0, stays = 0;
static long counted = 0;

/* Control, called from the process itself. */

void shim_arm(long n, int what, int error, int sticky) {
    countdown = n, mode = what, error_number = error, stays = sticky, counted = 0;
}

long shim_count(void) { return counted; }

int shim_log(const char *path) {
    if (log_fd >= 0) syscall(SYS_close, log_fd);
    log_fd = path == NULL ? -1
                          : (int)syscall(SYS_openat, AT_FDCWD, path,
                                         O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
    return log_fd;
}

/* Helpers */

static int below_root(const char *path) {
    const char *root = getenv("SHIM_ROOT");
    return root != NULL && path != NULL && strncmp(path, root, strlen(root)) == 0;
}

static int ours(int fd) { return fd >= 0 && fd < MAX_FD && is_ours[fd]; }

/* What is to happen to this operation. */
static int fate(void) {
    counted++;
    if (countdown == 0) return PASS;
    if (countdown > 1) {
        countdown--;
        return PASS;
    }
    int what = mode;
    if (!stays) countdown = 0;
    if (what == SHORT && stays) mode = FAIL; /* half of this write, and nothing of the next */
    if (what == KILL_BEFORE) kill(getpid(), SIGKILL);
    return what;
}

static void finish(int what) {
    if (what == KILL_AFTER) kill(getpid(), SIGKILL);
}

static void put(const char *data, size_t length) {
    while (length > 0) {
        long done = syscall(SYS_write, log_fd, data, length);
        if (done <= 0) abort();
        data += done, length -= (size_t)done;
    }
}

/* One line, "operation number number length path other", then `length` bytes. No path has a space. */
static void record(char operation, long a, long b, const char *path, const char *other, const void *data,
                   size_t length) {
    if (log_fd < 0) return;
    int saved = errno;
    char line[9000];
    int used = snprintf(line, sizeof line, "%c %ld %ld %zu %s %s\n", operation, a, b, length,
                        path ? path : "-", other ? other : "-");
    put(line, (size_t)used);
    put(data, length);
    errno = saved;
}

static long failed(void) {
    errno = error_number;
    return -1;
}

/* The calls */

static int do_open(int at, const char *path, int flags, int permissions) {
    if (!below_root(path)) {
        int fd = (int)syscall(SYS_openat, at, path, flags, permissions);
        if (fd >= 0 && fd < MAX_FD) is_ours[fd] = 0;
        return fd;
    }
    int what = fate();
    if (what == FAIL || what == SHORT) return (int)failed();
    struct stat status;
    int was_there = syscall(SYS_faccessat, AT_FDCWD, path, F_OK) == 0;
    int fd = (int)syscall(SYS_openat, at, path, flags, permissions);
    if (fd >= 0 && fd < MAX_FD) {
        is_ours[fd] = 1;
        int is_folder = fstat(fd, &status) == 0 && S_ISDIR(status.st_mode);
        long kind = is_folder ? 2 : !was_there ? 1 : (flags & O_TRUNC) ? 3 : 0;
        record('O', fd, kind, path, NULL, NULL, 0);
    }
    finish(what);
    return fd;
}

#define OPEN(name)                                     \
    int name(const char *path, int flags, ...) {       \
        va_list rest;                                  \
        va_start(rest, flags);                         \
        int permissions = va_arg(rest, int);           \
        va_end(rest);                                  \
        return do_open(AT_FDCWD, path, flags, permissions); \
    }
#define OPENAT(name)                                   \
    int name(int at, const char *path, int flags, ...) { \
        va_list rest;                                  \
        va_start(rest, flags);                         \
        int permissions = va_arg(rest, int);           \
        va_end(rest);                                  \
        return do_open(at, path, flags, permissions);  \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

static ssize_t do_write(int fd, const void *data, size_t length, long offset, int positioned) {
    int what = ours(fd) ? fate() : PASS;
    if (what == FAIL) return failed();
    if (what == SHORT) length /= 2;
    if (ours(fd) && !positioned) {
        int flags = (int)syscall(SYS_fcntl, fd, F_GETFL);
        offset = syscall(SYS_lseek, fd, 0, flags & O_APPEND ? SEEK_END : SEEK_CUR);
    }
    ssize_t done = positioned ? syscall(SYS_pwrite64, fd, data, length, offset)
                              : syscall(SYS_write, fd, data, length);
    if (ours(fd) && done >= 0) record('W', fd, offset, NULL, NULL, data, (size_t)done);
    finish(what);
    return done;
}

ssize_t write(int fd, const void *data, size_t length) { return do_write(fd, data, length, 0, 0); }
ssize_t pwrite(int fd, const void *data, size_t length, off_t at) {
    return do_write(fd, data, length, (long)at, 1);
}
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t at) {
    return do_write(fd, data, length, (long)at, 1);
}

static int do_truncate(int fd, long length) {
    int what = ours(fd) ? fate() : PASS;
    if (what == FAIL || what == SHORT) return (int)failed();
    int result = (int)syscall(SYS_ftruncate, fd, length);
    if (ours(fd) && result == 0) record('T', fd, length, NULL, NULL, NULL, 0);
    finish(what);
    return result;
}

int ftruncate(int fd, off_t length) { return do_truncate(fd, (long)length); }
int ftruncate64(int fd, off64_t length) { return do_truncate(fd, (long)length); }

static int do_sync(int fd, long number) {
    int what = ours(fd) ? fate() : PASS;
    if (what == FAIL || what == SHORT) {
        record('X', fd, 0, NULL, NULL, NULL, 0);
        return (int)failed();
    }
    int result = (int)syscall(number, fd);
    if (ours(fd) && result == 0) record('S', fd, 0, NULL, NULL, NULL, 0);
    finish(what);
    return result;
}

int fsync(int fd) { return do_sync(fd, SYS_fsync); }
int fdatasync(int fd) { return do_sync(fd, SYS_fdatasync); }

int close(int fd) {
    if (ours(fd)) {
        record('C', fd, 0, NULL, NULL, NULL, 0);
        is_ours[fd] = 0;
    }
    return (int)syscall(SYS_close, fd);
}

int unlink(const char *path) {
    int what = below_root(path) ? fate() : PASS;
    if (what == FAIL || what == SHORT) return (int)failed();
    int result = (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    if (below_root(path) && result == 0) record('U', 0, 0, path, NULL, NULL, 0);
    finish(what);
    return result;
}

static int do_two(char operation, const char *from, const char *to) {
    int what = below_root(to) ? fate() : PASS;
    if (what == FAIL || what == SHORT) return (int)failed();
    int result = operation == 'R' ? (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0)
                                  : (int)syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
    if (below_root(to) && result == 0) record(operation, 0, 0, from, to, NULL, 0);
    finish(what);
    return result;
}

int rename(const char *from, const char *to) { return do_two('R', from, to); }
int link(const char *from, const char *to) { return do_two('L', from, to); }
int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
    if (!below_root(to)) return (int)syscall(SYS_linkat, from_at, from, to_at, to, flags);
    return do_two('L', from, to);
}
