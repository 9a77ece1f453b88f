/* Preloaded, it adds to the time of day what the file $STEPPED_CLOCK holds, in nanoseconds, which may
   change at any moment. Waits until a time of day stay as long; monotonic clocks and the times of
   files are left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define BILLION 1000000000LL

static volatile long long *offset;

__attribute__((constructor)) static void open_offset(void) {
  const char *path = getenv("STEPPED_CLOCK");
  int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (fd < 0) return;
  void *found = mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, fd, 0);
  if (found != MAP_FAILED) offset = found;
  close(fd);
}

static struct timespec shifted(struct timespec at, long long by) {
  long long all = at.tv_sec * BILLION + at.tv_nsec + by;
  return (struct timespec){all / BILLION, all % BILLION};
}

int clock_gettime(clockid_t clock, struct timespec *at) {
  int failed = (int)syscall(SYS_clock_gettime, clock, at);
  if (!failed && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
    *at = shifted(*at, *offset);
  return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  *at = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
  return 0;
}

time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}

/* A small number is not a time of day: a condition may count in monotonic time. */
static struct timespec real(const struct timespec *at) {
  return offset && at->tv_sec > BILLION ? shifted(*at, -*offset) : *at;
}

int pthread_cond_timedwait(pthread_cond_t *restrict one, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict at) {
  static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
  if (!wait) wait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  if (!wait) wait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
  struct timespec until = real(at);
  return wait(one, mutex, &until);
}

int sem_timedwait(sem_t *restrict one, const struct timespec *restrict at) {
  static int (*wait)(sem_t *, const struct timespec *);
  if (!wait) wait = dlsym(RTLD_NEXT, "sem_timedwait");
  struct timespec until = real(at);
  return wait(one, &until);
}
