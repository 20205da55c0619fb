/* model.c: runs a kernel that was compiled with model.h, and stands in for the driver and the kernel store under the CUDA engine's host code. Device
 * memory is host memory, so the engine computes on tensors of the CPU.
 *
 * fa_store_get compiles a variant of MODEL_SOURCES (the repository) with the C++ compiler into MODEL_FOLDER, both environment variables.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include "core/error.h"
#include "core/numeric.h"
#include "cuda/engine.h"
#include "cuda/store/store.h"

enum { MOST_THREADS = 640, STACK_BYTES = 256 << 10, LANES = 32, WORDS = 12 };
enum { MEET_SHUFFLE = 1, MEET_BALLOT, MEET_LDMATRIX, MEET_LDMATRIX_TRANS, MEET_MMA_F16, MEET_MMA_BF16, MEET_SYNC };

typedef struct {
  jmp_buf here;
  int started, finished;
  char *stack;
} thread;

typedef struct {
  int meeting, arrived, round, present;
  uint32_t words[LANES][WORDS];
} warp;

typedef struct {
  unsigned x, y, z;
} model_dim;

_Alignas(1024) unsigned char shared[256 << 10];
model_dim model_block, model_grid;
thread *model_current;

static thread threads[MOST_THREADS];
static warp warps[MOST_THREADS / LANES];
static struct { int arrived, round, present, any, result; } block;
static int thread_count;
static jmp_buf scheduler;
static void (*kernel_entry)(const void *);
static const void *kernel_arguments;

unsigned model_thread_index(void) { return (unsigned)(model_current - threads); }
unsigned model_block_size(void) { return (unsigned)thread_count; }

static void yield(void) {
  if (!_setjmp(model_current->here)) _longjmp(scheduler, 1);
}

void model_yield(void) { yield(); }

int model_meet_block(int value) {
  int round = block.round;
  block.any |= value;
  if (++block.arrived == block.present) {
    block.result = block.any;
    block.arrived = block.any = 0;
    block.round++;
  } else {
    while (block.round == round) yield();
  }
  return block.result;
}

static void ldmatrix(warp *w, int transposed) {
  uint16_t matrix[4][8][8];
  for (int i = 0; i < 4; i++)
    for (int row = 0; row < 8; row++) {
      uint32_t at = w->words[8 * i + row][0];
      if (at % 16) abort();
      memcpy(matrix[i][row], shared + at, 16);
    }
  for (int lane = 0; lane < LANES; lane++)
    for (int i = 0; i < 4; i++) {
      int g = lane / 4, q = 2 * (lane % 4);
      uint16_t low = transposed ? matrix[i][q][g] : matrix[i][g][q], high = transposed ? matrix[i][q + 1][g] : matrix[i][g][q + 1];
      w->words[lane][i] = low | (uint32_t)high << 16;
    }
}

static float element(uint32_t word, int half, int meeting) {
  uint16_t bits = (uint16_t)(word >> (16 * half));
  return meeting == MEET_MMA_F16 ? fa_from_f16(bits) : fa_from_bf16(bits);
}

/* Tensor cores add exactly and round toward zero. */
static float toward_zero(double x) {
  float y = (float)x;
  return fabs((double)y) > fabs(x) ? nextafterf(y, 0.0f) : y;
}

static void mma(warp *w, int meeting) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < LANES; lane++) {
    int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; i++)
      for (int h = 0; h < 2; h++) a[g + 8 * (i & 1)][2 * q + h + 8 * (i >> 1)] = element(w->words[lane][4 + i], h, meeting);
    for (int i = 0; i < 2; i++)
      for (int h = 0; h < 2; h++) b[2 * q + h + 8 * i][g] = element(w->words[lane][8 + i], h, meeting);
  }
  for (int lane = 0; lane < LANES; lane++)
    for (int e = 0; e < 4; e++) {
      int row = lane / 4 + 8 * (e >> 1), column = 2 * (lane % 4) + (e & 1);
      double d = fa_float(w->words[lane][e]);
      for (int k = 0; k < 16; k++) d += (double)a[row][k] * b[k][column];
      w->words[lane][e] = fa_bits(toward_zero(d));
    }
}

static void meet(warp *w) {
  uint32_t old[LANES][WORDS], bits = 0;
  switch (w->meeting) {
    case MEET_SHUFFLE:
      memcpy(old, w->words, sizeof old);
      for (int lane = 0; lane < LANES; lane++) {
        int from = (int)old[lane][2];
        memcpy(w->words[lane], old[from >= 0 && from < LANES ? from : lane], 8);
      }
      break;
    case MEET_BALLOT:
      for (int lane = 0; lane < LANES; lane++) bits |= w->words[lane][0] << lane;
      for (int lane = 0; lane < LANES; lane++) w->words[lane][0] = bits;
      break;
    case MEET_LDMATRIX: ldmatrix(w, 0); break;
    case MEET_LDMATRIX_TRANS: ldmatrix(w, 1); break;
    case MEET_SYNC: break;
    default: mma(w, w->meeting);
  }
}

void model_meet_warp(int meeting, uint32_t *words) {
  unsigned index = model_thread_index();
  warp *w = &warps[index / LANES];
  int round = w->round;
  if (w->arrived && w->meeting != meeting) {
    fprintf(stderr, "thread %u meets its warp at %d, the others at %d\n", index, meeting, w->meeting);
    abort();
  }
  w->meeting = meeting;
  memcpy(w->words[index % LANES], words, sizeof w->words[0]);
  if (++w->arrived == LANES) {
    meet(w);
    w->arrived = 0;
    w->round++;
  } else {
    while (w->round == round) yield();
  }
  memcpy(words, w->words[index % LANES], sizeof w->words[0]);
}

static void thread_main(void) {
  kernel_entry(kernel_arguments);
  model_current->finished = 1;
  block.present--;
  if (block.present && block.arrived == block.present) { /* those at the barrier waited for this one only */
    block.result = block.any;
    block.arrived = block.any = 0;
    block.round++;
  }
  _longjmp(scheduler, 1);
}

static void resume(thread *t) {
  static ucontext_t start, back;
  model_current = t;
  if (_setjmp(scheduler)) return;
  if (t->started) _longjmp(t->here, 1);
  t->started = 1;
  getcontext(&start);
  start.uc_stack.ss_sp = t->stack;
  start.uc_stack.ss_size = STACK_BYTES;
  start.uc_link = &back;
  makecontext(&start, thread_main, 0);
  setcontext(&start);
}

static void run_block(void) {
  memset(warps, 0, sizeof warps);
  memset(&block, 0, sizeof block);
  memset(shared, 0xFF, sizeof shared); /* NaN in every type */
  block.present = thread_count;
  for (int i = 0; i < thread_count; i++) {
    if (!threads[i].stack) threads[i].stack = malloc(STACK_BYTES);
    threads[i].started = threads[i].finished = 0;
  }
  for (int left = thread_count; left;) {
    left = 0;
    for (int i = 0; i < thread_count; i++) {
      if (threads[i].finished) continue;
      resume(&threads[i]);
      left += !threads[i].finished;
    }
  }
}

/* ---- in place of driver.c and store/ ---- */

static fa_device_limits device = {.cc_major = 8, .sm_count = 108, .smem_per_block_optin = 166912, .name = "model"};

void model_set_device(int cc_major, int cc_minor, int sm_count, int smem) {
  device.cc_major = cc_major, device.cc_minor = cc_minor, device.sm_count = sm_count;
  device.smem_per_block_optin = smem, device.smem_per_sm = smem + 1024;
}

fa_code fa_driver_device(int index, const fa_device_limits **limits, fa_error *error) {
  (void)index, (void)error;
  *limits = &device;
  return FA_OK;
}

fa_code fa_driver_memset(int index, void *pointer, unsigned char value, size_t bytes, void *stream, fa_error *error) {
  (void)index, (void)stream, (void)error;
  memset(pointer, value, bytes);
  return FA_OK;
}

fa_code fa_driver_tensor_map(int index, const fa_tensor_map_shape *shape, fa_tensor_map *map, fa_error *error) {
  (void)index, (void)error;
  memcpy(map, shape, sizeof *shape); /* model_sm90.h reads it */
  return FA_OK;
}

static void *build(const char *name, const fa_variant *v, fa_error *error) {
  char command[4096], path[768];
  const char *folder = getenv("MODEL_FOLDER"), *sources = getenv("MODEL_SOURCES");
  snprintf(path, sizeof path, "%s/%s.so", folder, name);
  if (access(path, R_OK)) {
    int used = snprintf(command, sizeof command,
                        "g++ -std=gnu++17 -O1 -w -shared -fPIC -mfma -DKERNEL=%s -DKERNEL_FILE='\"%s/csrc/cuda/kernels/%s.cu\"'", v->entry,
                        sources, v->kernel);
    for (int i = 0; i < v->constant_count; i++)
      used += snprintf(command + used, sizeof command - (size_t)used, " -D%s=%d", v->constants[i].name, v->constants[i].value);
    snprintf(command + used, sizeof command - (size_t)used, " %s/tests/gpu_model/kernel.cpp -o %s.%d && mv %s.%d %s", sources, path,
             (int)getpid(), path, (int)getpid(), path);
    if (system(command)) return fa_fail(error, FA_ERR_RUNTIME, "the model cannot compile %s", name), NULL;
  }
  void *library = dlopen(path, RTLD_NOW);
  if (!library) fa_fail(error, FA_ERR_RUNTIME, "%s", dlerror());
  return library ? dlsym(library, "model_kernel") : NULL;
}

fa_code fa_store_get(int index, const fa_variant *v, const fa_kernel **kernel, fa_error *error) {
  static fa_kernel kernels[512];
  char name[FA_KERNEL_NAME_BYTES];
  int used = snprintf(name, sizeof name, "%s", v->kernel), i = 0;
  (void)index;
  for (int c = 0; c < v->constant_count; c++)
    used += snprintf(name + used, sizeof name - (size_t)used, "-%s=%d", v->constants[c].name, v->constants[c].value);
  while (i < 511 && kernels[i].function && strcmp(kernels[i].name, name)) i++;
  if (!kernels[i].function) {
    void *function = build(name, v, error);
    if (!function) return FA_ERR_RUNTIME;
    kernels[i].function = function;
    strcpy(kernels[i].name, name);
  }
  *kernel = &kernels[i];
  return v->dynamic_smem_bytes <= (int)sizeof shared
             ? FA_OK
             : fa_fail(error, FA_ERR_RUNTIME, "%s: %d bytes of shared memory", name, v->dynamic_smem_bytes);
}

fa_code fa_driver_launch(const fa_kernel *kernel, const fa_launch_shape *shape, void **arguments, fa_error *error) {
  (void)error;
  memcpy(&kernel_entry, &kernel->function, sizeof kernel_entry);
  kernel_arguments = arguments;
  thread_count = (int)shape->block[0];
  model_grid = (model_dim){shape->grid[0], shape->grid[1], shape->grid[2]};
  for (model_block.z = 0; model_block.z < shape->grid[2]; model_block.z++)
    for (model_block.y = 0; model_block.y < shape->grid[1]; model_block.y++)
      for (model_block.x = 0; model_block.x < shape->grid[0]; model_block.x++) run_block();
  return FA_OK;
}

static void *allocations[64];
static int allocation_count;

static void *allocate(void *context, size_t bytes) {
  (void)context;
  void *memory = allocation_count < 64 ? aligned_alloc(256, (bytes + 255) / 256 * 256) : NULL;
  if (memory) memset(memory, 0xFF, bytes);
  return memory ? allocations[allocation_count++] = memory : NULL;
}

/* The engine's forward or backward pass on tensors in host memory. */
int model_run(const fa_request *request, int backward, fa_error *error) {
  const fa_context context = {.alloc = allocate};
  fa_problem problem;
  fa_code code = fa_problem_init(&problem, request, backward ? FA_BACKWARD : FA_FORWARD, 1, error);
  if (code == FA_OK) code = (backward ? fa_cuda_backward : fa_cuda_forward)(&problem, &context, error);
  while (allocation_count) free(allocations[--allocation_count]);
  return (int)code;
}
