/* threads.c: one parallel loop on one of two pools.
 *
 * torch's pool is used when torch is in the process: its thread count is honoured and no second set of threads competes with it. It is
 * reached through the stable C functions of libtorch_cpu, looked up by name, so nothing links torch or an OpenMP runtime.
 *
 * Otherwise, and in a forked child (where torch's threads are gone and waiting for them would hang), our own pool runs the loop. It
 * serves one loop at a time; a second one at the same moment runs in its caller. Results never depend on which of these happened.
 */
#define _GNU_SOURCE /* dl_iterate_phdr, CPU_COUNT */
#include "threads.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_THREADS = 1024 };

/* One loop, shared by its workers. */
typedef struct {
  atomic_llong next;
  int64_t items;
  void (*fn)(int64_t item, int worker, void *context);
  void *context;
} loop;

static _Thread_local int inside; /* this thread runs items of some loop */

static void work(loop *l, int worker) {
  int outer = inside;
  inside = 1;
  for (;;) {
    int64_t item = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
    if (item >= l->items) break;
    l->fn(item, worker, l->context);
  }
  inside = outer;
}

/* ---- torch's pool ---- */

typedef int32_t (*torch_parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t begin, int64_t end, void *), void *);
typedef int32_t (*torch_get_num_threads)(uint32_t *count);

static struct {
  _Atomic(torch_parallel_for) parallel_for; /* NULL: torch is not loaded, or too old. Published last. */
  torch_get_num_threads get_num_threads;
  atomic_ullong libraries_seen; /* loads so far when we last looked, so that looking again is cheap */
  pthread_mutex_t lock;
} torch = {.lock = PTHREAD_MUTEX_INITIALIZER};

static atomic_int forked; /* this process is a forked child */

static int count_loads(struct dl_phdr_info *info, size_t size, void *out) {
  (void)size;
  *(unsigned long long *)out = info->dlpi_adds;
  return 1;
}

static int is_libtorch(struct dl_phdr_info *info, size_t size, void *out) {
  (void)size;
  if (!info->dlpi_name || !strstr(info->dlpi_name, "libtorch_cpu.so")) return 0;
  snprintf(out, 4096, "%s", info->dlpi_name);
  return 1;
}

static void find_torch(void) {
  unsigned long long loads = 0;
  dl_iterate_phdr(count_loads, &loads);
  if (loads == atomic_load_explicit(&torch.libraries_seen, memory_order_relaxed)) return;
  char path[4096] = "";
  pthread_mutex_lock(&torch.lock);
  dl_iterate_phdr(is_libtorch, path);
  void *library = *path ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : NULL; /* never closed: torch does not unload either */
  if (library) {
    torch_parallel_for parallel_for = (torch_parallel_for)dlsym(library, "torch_parallel_for");
    torch.get_num_threads = (torch_get_num_threads)dlsym(library, "torch_get_num_threads");
    if (parallel_for && torch.get_num_threads) atomic_store_explicit(&torch.parallel_for, parallel_for, memory_order_release);
  }
  atomic_store_explicit(&torch.libraries_seen, loads, memory_order_relaxed);
  pthread_mutex_unlock(&torch.lock);
}

static torch_parallel_for torch_pool(void) {
  torch_parallel_for found = atomic_load_explicit(&torch.parallel_for, memory_order_acquire);
  if (found) return found;
  find_torch();
  return atomic_load_explicit(&torch.parallel_for, memory_order_acquire);
}

/* torch hands each of its threads one range, usually a single number. */
static void work_range(int64_t begin, int64_t end, void *context) {
  for (int64_t worker = begin; worker < end; worker++) work(context, (int)worker);
}

/* ---- Our own pool ---- */

static struct {
  pthread_mutex_t lock;
  pthread_cond_t start, end;
  int threads;     /* created so far; they live as long as the process */
  int busy;        /* a loop owns the pool */
  loop *current;   /* NULL: nothing to join */
  int next_worker; /* of the current loop; its caller is worker 0 */
  int workers;     /* most workers that may join it */
  int active;      /* pool threads inside it */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .start = PTHREAD_COND_INITIALIZER, .end = PTHREAD_COND_INITIALIZER};

static void *pool_thread(void *unused) {
  pthread_mutex_lock(&pool.lock);
  for (;;) {
    while (!pool.current || pool.next_worker >= pool.workers) pthread_cond_wait(&pool.start, &pool.lock);
    loop *l = pool.current;
    int worker = pool.next_worker++;
    pool.active++;
    pthread_mutex_unlock(&pool.lock);
    work(l, worker);
    pthread_mutex_lock(&pool.lock);
    if (--pool.active == 0) pthread_cond_signal(&pool.end);
  }
  return unused;
}

/* With all signals blocked, so that Python's main thread keeps receiving them. Fewer threads than wanted is no error: loops run anyway. */
static void grow_pool(int threads) {
  sigset_t all, before;
  pthread_attr_t detached;
  if (pool.threads >= threads || pthread_attr_init(&detached) != 0) return;
  pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t id;
  while (pool.threads < threads && pthread_create(&id, &detached, pool_thread, NULL) == 0) pool.threads++;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&detached);
}

/* 0 when another loop has the pool. */
static int run_on_pool(loop *l, int workers) {
  pthread_mutex_lock(&pool.lock);
  int taken = pool.busy;
  if (!taken) {
    grow_pool(workers - 1);
    pool.busy = 1;
    pool.current = l;
    pool.next_worker = 1;
    pool.workers = workers;
    pthread_cond_broadcast(&pool.start);
  }
  pthread_mutex_unlock(&pool.lock);
  if (taken) return 0;
  work(l, 0);
  pthread_mutex_lock(&pool.lock);
  pool.current = NULL; /* nobody joins from here on; those inside finish their items */
  while (pool.active > 0) pthread_cond_wait(&pool.end, &pool.lock);
  pool.busy = 0;
  pthread_mutex_unlock(&pool.lock);
  return 1;
}

/* The child of a fork has this one thread only, and its copies of the locks may be held by threads that are gone. */
static void after_fork_in_child(void) {
  static const pthread_mutex_t fresh_lock = PTHREAD_MUTEX_INITIALIZER;
  static const pthread_cond_t fresh_condition = PTHREAD_COND_INITIALIZER;
  torch.lock = pool.lock = fresh_lock;
  pool.start = pool.end = fresh_condition;
  pool.threads = pool.busy = pool.active = pool.next_worker = pool.workers = 0;
  pool.current = NULL;
  atomic_store(&forked, 1);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

/* ---- How many ---- */

static int count_from_environment(const char *name) {
  const char *text = getenv(name);
  long count = text ? strtol(text, NULL, 10) : 0; /* OMP_NUM_THREADS may be a list: its first number */
  return count > 0 && count <= MAX_THREADS ? (int)count : 0;
}

/* CPUs that the control group's time quota is worth, or `limit` where there is none. */
static int quota_cpus(int limit) {
  long long quota = -1, period = 0;
  FILE *file = fopen("/sys/fs/cgroup/cpu.max", "re");
  if (!file) return limit;
  int fields = fscanf(file, "%lld %lld", &quota, &period); /* "max 100000": no number, no quota */
  fclose(file);
  if (fields != 2 || quota <= 0 || period <= 0) return limit;
  long long cpus = (quota + period - 1) / period;
  return cpus < limit ? (int)cpus : limit;
}

static int usable_cpus(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return quota_cpus(CPU_COUNT(&set));
  long online = sysconf(_SC_NPROCESSORS_ONLN);
  return quota_cpus(online > 0 && online <= MAX_THREADS ? (int)online : 1);
}

/* Asked once: environment and affinity at the first loop are those of the process. */
static int own_count(void) {
  static atomic_int known;
  int count = atomic_load_explicit(&known, memory_order_relaxed);
  if (count) return count;
  count = count_from_environment("FLASH_ATTN_C_NUM_THREADS");
  if (!count) count = count_from_environment("OMP_NUM_THREADS");
  if (!count) count = usable_cpus();
  atomic_store_explicit(&known, count, memory_order_relaxed);
  return count;
}

int fa_thread_count(void) {
  uint32_t count = 0;
  if (inside) return 1;
  if (!torch_pool() || torch.get_num_threads(&count) != 0 || count < 1) return own_count();
  return count < MAX_THREADS ? (int)count : MAX_THREADS;
}

const char *fa_thread_source(void) { return torch_pool() && !atomic_load(&forked) ? "torch" : "own"; }

void fa_parallel(int64_t items, int workers, void (*fn)(int64_t item, int worker, void *context), void *context) {
  loop l = {0, items, fn, context};
  if (workers > items) workers = (int)items;
  if (workers > 1 && !inside) {
    torch_parallel_for parallel_for = atomic_load(&forked) ? NULL : torch_pool();
    if (parallel_for) {
      if (parallel_for(0, workers, 1, work_range, &l) == 0 && atomic_load(&l.next) >= items) return;
    } else if (run_on_pool(&l, workers)) {
      return;
    }
  }
  work(&l, 0);
}

/* Short waits are the rule, so look a while before giving the core away: it may be the one that the other thread needs. */
void fa_wait_above(atomic_int *value, int limit) {
  for (int looks = 0; atomic_load_explicit(value, memory_order_acquire) <= limit; looks++)
    if (looks >= 2000) sched_yield();
}
