/* Preloaded into a process: records, fails, or kills it at, the system calls by which files change.
 *
 * fault_arm() says which directory is watched and what is to happen; before it nothing does. A call
 * counts if it changes something under that directory (and its kind is asked for). Writes through a
 * memory map are not seen: of tallstore's files only LMDB's lock file is written so, and it means
 * nothing after a power cut.
 *
 * A record of the log, little endian: kind (1 byte), flags (1: O_DSYNC or O_SYNC), lengths of path,
 * second path (u16 each) and data (u64), offset or size (u64), inode (u64); then the three.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAIL = 1, KILL = 2, HALF = 4, STICKY = 8 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char watched[PATH_MAX];
static char kinds[32];
static int log_fd = -1;
static long at, count;
static int error, action;

#define REAL(result, name, ...)                                  \
    static result (*real)(__VA_ARGS__);                          \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static ssize_t raw_write(int fd, const void *data, size_t size, off_t offset, int seek)
{
    static ssize_t (*real_write)(int, const void *, size_t);
    static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
    if (!real_write) real_write = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    if (!real_pwrite)
        real_pwrite = (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
    return seek ? real_pwrite(fd, data, size, offset) : real_write(fd, data, size);
}

void fault_arm(const char *directory, const char *log, long when, int number, const char *which,
               int what)
{
    strncpy(watched, directory, sizeof watched - 1);
    strncpy(kinds, which, sizeof kinds - 1);
    at = when, count = 0, error = number, action = what;
    if (log && *log) {
        int fd = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        log_fd = fd;
    }
}

void fault_disarm(void) { watched[0] = 0; }

long fault_count(void) { return count; }

static int under(const char *path)
{
    size_t n = strlen(watched);
    return n && !strncmp(path, watched, n) && (path[n] == '/' || !path[n]);
}

static void absolute(int directory, const char *path, char *out)
{
    char base[PATH_MAX] = "";
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t n = readlink(link, base, sizeof base - 1);
        base[n < 0 ? 0 : n] = 0;
    }
    snprintf(out, PATH_MAX, "%.*s/%s", PATH_MAX / 2, base, path);
}

static int fd_path(int fd, char *out)
{
    char link[64];
    if (!watched[0] || fd == log_fd) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    if (n < 0) return 0;
    out[n] = 0;
    return under(out);
}

static void record(char kind, int flags, const char *path, const char *second, const void *data,
                   uint64_t size, uint64_t offset, uint64_t inode)
{
    if (log_fd < 0) return;
    unsigned char head[30];
    uint16_t a = strlen(path), b = second ? strlen(second) : 0;
    head[0] = kind, head[1] = flags;
    memcpy(head + 2, &a, 2), memcpy(head + 4, &b, 2), memcpy(head + 6, &size, 8);
    memcpy(head + 14, &offset, 8), memcpy(head + 22, &inode, 8);
    raw_write(log_fd, head, sizeof head, 0, 0);
    raw_write(log_fd, path, a, 0, 0);
    if (b) raw_write(log_fd, second, b, 0, 0);
    const char *from = data;
    while (size) {
        ssize_t n = raw_write(log_fd, from, size, 0, 0);
        if (n <= 0) break;
        from += n, size -= n;
    }
}

void fault_mark(const char *text) { record('m', 0, text, 0, 0, 0, 0, 0); }

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Whether this call is to fail: 0 no, 1 yes, 2 after half of it. */
static int due(char kind)
{
    int yes = 0;
    if (!strchr(kinds, kind)) return 0;
    count++;
    if (!at) return 0;
    if (count == at) yes = 1;
    if (count > at && (action & STICKY)) yes = 1;
    if (!yes) return 0;
    if ((action & HALF) && count == at && kind == 'w') return 2;
    if (action & KILL) die();
    return 1;
}

static uint64_t inode_of(int fd, int *flags)
{
    struct stat status;
    int found = fcntl(fd, F_GETFL);
    if (flags) *flags = found >= 0 && (found & O_DSYNC) ? 1 : 0;
    return fstat(fd, &status) ? 0 : status.st_ino;
}

#define LOCKED(...)                                     \
    do {                                                \
        pthread_mutex_lock(&mutex);                     \
        __VA_ARGS__;                                    \
        int kept = errno;                               \
        pthread_mutex_unlock(&mutex);                   \
        errno = kept;                                   \
    } while (0)

/* -- writing ------------------------------------------------------------------------------- */

static ssize_t do_write(int fd, const void *data, size_t size, off_t offset, int seek)
{
    char path[PATH_MAX];
    ssize_t result;
    if (!fd_path(fd, path)) return raw_write(fd, data, size, offset, seek);
    LOCKED({
        int flags, now = due('w');
        uint64_t inode = inode_of(fd, &flags);
        if (!seek) offset = lseek(fd, 0, SEEK_CUR);
        if (now == 1) {
            errno = error;
            result = -1;
        } else {
            if (now == 2 && size > 1) size /= 2;
            result = raw_write(fd, data, size, offset, seek);
            if (now == 2 && (action & KILL)) die();
            if (result > 0) record('w', flags, path, 0, data, result, offset, inode);
        }
    });
    return result;
}

ssize_t write(int fd, const void *data, size_t size) { return do_write(fd, data, size, 0, 0); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t o) { return do_write(fd, data, size, o, 1); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t o) { return do_write(fd, data, size, o, 1); }

static ssize_t do_writev(int fd, const struct iovec *parts, int n, off_t offset, int seek)
{
    size_t size = 0, done = 0;
    for (int i = 0; i < n; i++) size += parts[i].iov_len;
    char *whole = malloc(size ? size : 1);
    if (!whole) return errno = ENOMEM, -1;
    for (int i = 0; i < n; i++) {
        memcpy(whole + done, parts[i].iov_base, parts[i].iov_len);
        done += parts[i].iov_len;
    }
    ssize_t result = do_write(fd, whole, size, offset, seek);
    int kept = errno;
    free(whole);
    errno = kept;
    return result;
}

ssize_t writev(int fd, const struct iovec *p, int n) { return do_writev(fd, p, n, 0, 0); }
ssize_t pwritev(int fd, const struct iovec *p, int n, off_t o) { return do_writev(fd, p, n, o, 1); }
ssize_t pwritev64(int fd, const struct iovec *p, int n, off_t o) { return do_writev(fd, p, n, o, 1); }

/* -- reading: only failed, never recorded ---------------------------------------------------- */

static int read_fails(int fd)
{
    char path[PATH_MAX];
    int now = 0;
    if (strchr(kinds, 'p') && fd_path(fd, path)) LOCKED(now = due('p'));
    if (now) errno = error;
    return now;
}

ssize_t read(int fd, void *data, size_t size)
{
    REAL(ssize_t, "read", int, void *, size_t);
    return read_fails(fd) ? -1 : real(fd, data, size);
}
ssize_t pread(int fd, void *data, size_t size, off_t offset)
{
    REAL(ssize_t, "pread", int, void *, size_t, off_t);
    return read_fails(fd) ? -1 : real(fd, data, size, offset);
}
ssize_t pread64(int fd, void *data, size_t size, off_t offset)
{
    REAL(ssize_t, "pread64", int, void *, size_t, off_t);
    return read_fails(fd) ? -1 : real(fd, data, size, offset);
}

/* -- sizes ----------------------------------------------------------------------------------- */

static int do_truncate(int fd, const char *path, off_t size)
{
    REAL(int, "ftruncate64", int, off_t);
    static int (*by_path)(const char *, off_t);
    char place[PATH_MAX];
    int result;
    if (!by_path) by_path = (int (*)(const char *, off_t))dlsym(RTLD_NEXT, "truncate64");
    if (path) absolute(AT_FDCWD, path, place);
    if (path ? !under(place) : !fd_path(fd, place)) return path ? by_path(path, size) : real(fd, size);
    LOCKED({
        if (due('t')) {
            errno = error;
            result = -1;
        } else {
            struct stat status;
            result = path ? by_path(path, size) : real(fd, size);
            uint64_t inode = (path ? stat(path, &status) : fstat(fd, &status)) ? 0 : status.st_ino;
            if (!result) record('t', 0, place, 0, 0, 0, size, inode);
        }
    });
    return result;
}

int ftruncate(int fd, off_t size) { return do_truncate(fd, 0, size); }
int ftruncate64(int fd, off_t size) { return do_truncate(fd, 0, size); }
int truncate(const char *path, off_t size) { return do_truncate(-1, path, size); }
int truncate64(const char *path, off_t size) { return do_truncate(-1, path, size); }

static int do_fallocate(int fd, int mode, off_t offset, off_t size)
{
    REAL(int, "fallocate64", int, int, off_t, off_t);
    char path[PATH_MAX];
    int now = 0;
    if (fd_path(fd, path)) LOCKED(now = due('a'));
    if (now) return errno = error, -1;
    return real(fd, mode, offset, size);
}

int fallocate(int fd, int mode, off_t o, off_t n) { return do_fallocate(fd, mode, o, n); }
int fallocate64(int fd, int mode, off_t o, off_t n) { return do_fallocate(fd, mode, o, n); }

/* -- syncs ----------------------------------------------------------------------------------- */

static int do_sync(int fd, int data_only)
{
    static int (*whole)(int), (*data)(int);
    char path[PATH_MAX];
    int result;
    if (!whole) whole = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    if (!data) data = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    if (!fd_path(fd, path)) return data_only ? data(fd) : whole(fd);
    LOCKED({
        if (due('s')) {
            errno = error;
            result = -1;
        } else {
            /* Recorded, not done: what is asked of the real disk is nothing to the simulation. */
            result = log_fd >= 0 ? 0 : data_only ? data(fd) : whole(fd);
            if (!result) record('s', data_only, path, 0, 0, 0, 0, inode_of(fd, 0));
        }
    });
    return result;
}

int fsync(int fd) { return do_sync(fd, 0); }
int fdatasync(int fd) { return do_sync(fd, 1); }

/* -- names ----------------------------------------------------------------------------------- */

static int do_open(int directory, const char *path, int flags, mode_t mode)
{
    REAL(int, "openat64", int, const char *, int, ...);
    char place[PATH_MAX];
    struct stat status;
    int result;
    if (!watched[0] || !(flags & (O_CREAT | O_TRUNC))) return real(directory, path, flags, mode);
    absolute(directory, path, place);
    if (!under(place)) return real(directory, path, flags, mode);
    LOCKED({
        int made = (flags & O_CREAT) && fstatat(directory, path, &status, 0);
        if (made && due('o')) {
            errno = error;
            result = -1;
        } else {
            result = real(directory, path, flags, mode);
            if (result >= 0 && made) record('o', 0, place, 0, 0, 0, 0, inode_of(result, 0));
            if (result >= 0 && !made && (flags & O_TRUNC))
                record('t', 0, place, 0, 0, 0, 0, inode_of(result, 0));
        }
    });
    return result;
}

#define OPEN(name, directory)                              \
    int name                                               \
    {                                                      \
        mode_t mode = 0;                                   \
        if (flags & (O_CREAT | __O_TMPFILE)) {             \
            va_list rest;                                  \
            va_start(rest, flags);                         \
            mode = va_arg(rest, mode_t);                   \
            va_end(rest);                                  \
        }                                                  \
        return do_open(directory, path, flags, mode);      \
    }

OPEN(open(const char *path, int flags, ...), AT_FDCWD)
OPEN(open64(const char *path, int flags, ...), AT_FDCWD)
OPEN(openat(int directory, const char *path, int flags, ...), directory)
OPEN(openat64(int directory, const char *path, int flags, ...), directory)

static int do_rename(int from_dir, const char *from, int to_dir, const char *to)
{
    REAL(int, "renameat", int, const char *, int, const char *);
    char a[PATH_MAX], b[PATH_MAX];
    struct stat status;
    int result;
    if (!watched[0]) return real(from_dir, from, to_dir, to);
    absolute(from_dir, from, a), absolute(to_dir, to, b);
    if (!under(a) && !under(b)) return real(from_dir, from, to_dir, to);
    LOCKED({
        if (due('r')) {
            errno = error;
            result = -1;
        } else {
            uint64_t inode = fstatat(from_dir, from, &status, AT_SYMLINK_NOFOLLOW) ? 0 : status.st_ino;
            result = real(from_dir, from, to_dir, to);
            if (!result) record('r', 0, a, b, 0, 0, 0, inode);
        }
    });
    return result;
}

int rename(const char *from, const char *to) { return do_rename(AT_FDCWD, from, AT_FDCWD, to); }
int renameat(int a, const char *from, int b, const char *to) { return do_rename(a, from, b, to); }

static int do_name(char kind, int directory, const char *path, int flags, mode_t mode)
{
    static int (*unlink_at)(int, const char *, int), (*mkdir_at)(int, const char *, mode_t);
    char place[PATH_MAX];
    int result;
    if (!unlink_at) unlink_at = (int (*)(int, const char *, int))dlsym(RTLD_NEXT, "unlinkat");
    if (!mkdir_at) mkdir_at = (int (*)(int, const char *, mode_t))dlsym(RTLD_NEXT, "mkdirat");
    absolute(directory, path, place);
    if (!under(place))
        return kind == 'd' ? mkdir_at(directory, path, mode) : unlink_at(directory, path, flags);
    LOCKED({
        struct stat status;
        int there = !fstatat(directory, path, &status, AT_SYMLINK_NOFOLLOW);
        if ((kind == 'd' || there) && due(kind)) {
            errno = error;
            result = -1;
        } else {
            result = kind == 'd' ? mkdir_at(directory, path, mode) : unlink_at(directory, path, flags);
            if (!result) record(kind, 0, place, 0, 0, 0, 0, there ? status.st_ino : 0);
        }
    });
    return result;
}

int unlink(const char *path) { return do_name('u', AT_FDCWD, path, 0, 0); }
int unlinkat(int d, const char *path, int flags) { return do_name('u', d, path, flags, 0); }
int rmdir(const char *path) { return do_name('u', AT_FDCWD, path, AT_REMOVEDIR, 0); }
int mkdir(const char *path, mode_t mode) { return do_name('d', AT_FDCWD, path, 0, mode); }
int mkdirat(int d, const char *path, mode_t mode) { return do_name('d', d, path, 0, mode); }
