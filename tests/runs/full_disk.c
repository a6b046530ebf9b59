/* A disk that is full from its k-th operation on, below one folder: preload it, then fault_begin.

   Whatever opens for writing, writes, syncs, renames or makes a folder below the prefix counts, of
   Python and of the libraries; reading and deleting go on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char prefix[4096];
static long first = 0, last = 0, count = 0;
static int reason = ENOSPC;

void fault_begin(const char *folder, long from, long to, int error) {
    strncpy(prefix, folder, sizeof prefix - 1);
    first = from, last = to, count = 0, reason = error;
}

long fault_count(void) { return count; }

static int fails(const char *path) {
    if (!prefix[0] || strncmp(path, prefix, strlen(prefix))) return 0;
    ++count;
    if (count < first || count > last) return 0;
    errno = reason;
    return 1;
}

static int fails_fd(int fd) {
    char link[64], path[4096];
    if (!prefix[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC | O_APPEND))
#define MODE                                                                                  \
    mode_t mode = 0;                                                                          \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                      \
        va_list arguments;                                                                    \
        va_start(arguments, flags);                                                           \
        mode = va_arg(arguments, mode_t);                                                     \
        va_end(arguments);                                                                    \
    }

int open(const char *path, int flags, ...) {
    MODE return WRITES(flags) && fails(path) ? -1 : NEXT(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE return WRITES(flags) && fails(path) ? -1 : NEXT(open64)(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    MODE return WRITES(flags) && fails(path) ? -1 : NEXT(openat)(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    MODE return WRITES(flags) && fails(path) ? -1 : NEXT(openat64)(at, path, flags, mode);
}
int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : NEXT(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return fails(to) ? -1 : NEXT(rename)(from, to); }
int fsync(int fd) { return fails_fd(fd) ? -1 : NEXT(fsync)(fd); }
int ftruncate(int fd, off_t size) { return fails_fd(fd) ? -1 : NEXT(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return fails_fd(fd) ? -1 : NEXT(ftruncate64)(fd, size); }
ssize_t write(int fd, const void *data, size_t size) {
    return fails_fd(fd) ? -1 : NEXT(write)(fd, data, size);
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size);
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
    return fails_fd(to) ? -1 : NEXT(sendfile64)(to, from, offset, size);
}
ssize_t sendfile(int to, int from, off_t *offset, size_t size);
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    return fails_fd(to) ? -1 : NEXT(sendfile)(to, from, offset, size);
}
ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *end, size_t size, unsigned f) {
    return fails_fd(to) ? -1 : NEXT(copy_file_range)(from, start, to, end, size, f);
}
