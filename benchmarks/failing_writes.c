/* Loaded before the C library (LD_PRELOAD): lets the n-th operation that changes files below one
   directory fail, or that one and all after it. chaos_storage.py compiles and drives it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static char failed[64];
static long count, first;
static int error_number, sticky;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* first: number of the operation that fails, from 1; 0: none does, they are only counted. */
void chaos_arm(const char *directory, long number, int error, int all_after) {
  pthread_mutex_lock(&lock);
  snprintf(prefix, sizeof prefix, "%s", directory);
  failed[0] = 0, count = 0, first = number, error_number = error, sticky = all_after;
  pthread_mutex_unlock(&lock);
}
void chaos_disarm(void) { prefix[0] = 0; }
long chaos_count(void) { return count; }
const char *chaos_failed(void) { return failed; }

static int fails(const char *name, const char *path) {
  if (!prefix[0] || !path || strncmp(path, prefix, strlen(prefix))) return 0;
  int now = 0;
  pthread_mutex_lock(&lock);
  count++;
  if (first && (count == first || (sticky && count > first))) {
    if (!failed[0]) snprintf(failed, sizeof failed, "%s", name);
    now = 1;
  }
  pthread_mutex_unlock(&lock);
  if (now) errno = error_number;
  return now;
}

static int fails_fd(const char *name, int fd) {
  char link[64], path[PATH_MAX];
  if (!prefix[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return fails(name, path);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPEN(name)                                                       \
  int name(const char *path, int flags, ...) {                           \
    REAL(name);                                                          \
    va_list list;                                                        \
    va_start(list, flags);                                               \
    mode_t mode = va_arg(list, mode_t);                                  \
    va_end(list);                                                        \
    if ((flags & O_ACCMODE) != O_RDONLY && fails("open", path)) return -1; \
    return real(path, flags, mode);                                      \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                     \
  int name(int at, const char *path, int flags, ...) {                   \
    REAL(name);                                                          \
    va_list list;                                                        \
    va_start(list, flags);                                               \
    mode_t mode = va_arg(list, mode_t);                                  \
    va_end(list);                                                        \
    if ((flags & O_ACCMODE) != O_RDONLY && fails("open", path)) return -1; \
    return real(at, path, flags, mode);                                  \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  return fails_fd("write", fd) ? -1 : real(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  REAL(pwrite);
  return fails_fd("write", fd) ? -1 : real(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  REAL(pwrite64);
  return fails_fd("write", fd) ? -1 : real(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
  REAL(writev);
  return fails_fd("write", fd) ? -1 : real(fd, parts, n);
}
int fsync(int fd) {
  REAL(fsync);
  return fails_fd("fsync", fd) ? -1 : real(fd);
}
int fdatasync(int fd) {
  REAL(fdatasync);
  return fails_fd("fsync", fd) ? -1 : real(fd);
}
int ftruncate(int fd, off_t size) {
  REAL(ftruncate);
  return fails_fd("truncate", fd) ? -1 : real(fd, size);
}
int mkdir(const char *path, mode_t mode) {
  REAL(mkdir);
  return fails("mkdir", path) ? -1 : real(path, mode);
}
int mkdirat(int at, const char *path, mode_t mode) {
  REAL(mkdirat);
  return fails("mkdir", path) ? -1 : real(at, path, mode);
}
int rename(const char *from, const char *to) {
  REAL(rename);
  return fails("rename", from) ? -1 : real(from, to);
}
int renameat(int at, const char *from, int to_at, const char *to) {
  REAL(renameat);
  return fails("rename", from) ? -1 : real(at, from, to_at, to);
}
int renameat2(int at, const char *from, int to_at, const char *to, unsigned flags) {
  REAL(renameat2);
  return fails("rename", from) ? -1 : real(at, from, to_at, to, flags);
}
int unlink(const char *path) {
  REAL(unlink);
  return fails("unlink", path) ? -1 : real(path);
}
/* With a directory's descriptor and a bare name (shutil.rmtree): whose directory, then. */
int unlinkat(int at, const char *path, int flags) {
  REAL(unlinkat);
  int now = path[0] == '/' ? fails("unlink", path) : fails_fd("unlink", at);
  return now ? -1 : real(at, path, flags);
}
int rmdir(const char *path) {
  REAL(rmdir);
  return fails("rmdir", path) ? -1 : real(path);
}
