/* test_problem.c: what the validator accepts and refuses when it is called from C. The full table of refusals is tested from Python; here are
 * the ones that Python cannot produce, and a sample of the others. */
#include <math.h>
#include <string.h>

#include "core_tests.h"
#include "csrc/core/error.h"
#include "csrc/core/problem.h"

static float memory[1 << 16];
static int32_t lengths[8] = {0, 3, 5, 5};

static fa_tensor strided(fa_dtype dtype, void *data, int ndim, int64_t a, int64_t b, int64_t c, int64_t d) {
  fa_tensor t = {.data = data, .dtype = dtype, .ndim = ndim, .shape = {a, b, c, d}};
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; i--) {
    t.stride[i] = stride;
    stride *= t.shape[i];
  }
  return t;
}

static fa_request dense(void) {
  fa_request r;
  memset(&r, 0, sizeof r);
  r.q = strided(FA_F32, memory, 4, 2, 5, 4, 8);
  r.k = strided(FA_F32, memory, 4, 2, 7, 2, 8);
  r.v = strided(FA_F32, memory, 4, 2, 7, 2, 3);
  r.out = strided(FA_F32, memory, 4, 2, 5, 4, 3);
  r.lse = strided(FA_F32, memory, 3, 2, 4, 5, 1);
  return r;
}

static fa_request packed(void) {
  fa_request r;
  memset(&r, 0, sizeof r);
  r.q = strided(FA_BF16, memory, 3, 5, 4, 8, 1);
  r.k = r.v = strided(FA_BF16, memory, 3, 6, 2, 8, 1);
  r.out = r.q;
  r.lse = strided(FA_F32, memory, 2, 4, 5, 1, 1);
  r.lengths.cu_seqlens_q = r.lengths.cu_seqlens_k = strided(FA_I32, lengths, 1, 4, 1, 1, 1);
  return r;
}

static void expect(const fa_request *request, fa_code code, const char *words, int line) {
  fa_problem problem;
  fa_error error = {FA_OK, ""};
  fa_code got = fa_problem_init(&problem, request, FA_FORWARD, 1, &error);
  CHECK(got == code && error.code == code, "line %d: code %d, %s", line, (int)got, error.message);
  CHECK(strstr(error.message, words), "line %d: '%s' not in '%s'", line, words, error.message);
  CHECK(fa_problem_init(&problem, request, FA_FORWARD, 1, NULL) == code, "line %d: without an fa_error", line);
}

/* A change to a request that is fine, and what must be said of it. */
#define REFUSED(base, change, code, words) \
  do {                                     \
    fa_request r = base();                 \
    change;                                \
    expect(&r, code, words, __LINE__);     \
  } while (0)

static void test_refusals(void) {
  REFUSED(dense, r.layout = (fa_layout)7, FA_ERR_VALUE, "layout");
  REFUSED(dense, r.q.dtype = FA_NONE, FA_ERR_TYPE, "q");
  REFUSED(dense, r.k.dtype = FA_OTHER, FA_ERR_TYPE, "k");
  REFUSED(dense, r.q.dtype = FA_F8_E4M3, FA_ERR_UNSUPPORTED, "q");
  REFUSED(dense, r.q.device = FA_DEVICE_OTHER, FA_ERR_TYPE, "q");
  REFUSED(dense, r.k.device = FA_CUDA, FA_ERR_VALUE, "k");
  REFUSED(dense, r.q.ndim = 3, FA_ERR_VALUE, "q");
  REFUSED(dense, r.q.shape[3] = 257, FA_ERR_VALUE, "257");
  REFUSED(dense, r.k.shape[2] = r.v.shape[2] = 3, FA_ERR_VALUE, "heads 3 must divide q: heads 4");
  REFUSED(dense, r.v.shape[1] = 6, FA_ERR_VALUE, "v");
  REFUSED(dense, r.visibility.causal = (fa_causal)9, FA_ERR_VALUE, "causal");
  REFUSED(dense, (r.visibility.has_window = 1, r.visibility.window_left = -3), FA_ERR_VALUE, "window");
  REFUSED(dense, (r.score.has_scale = 1, r.score.scale = NAN), FA_ERR_VALUE, "scale");
  REFUSED(dense, r.score.softcap = -1, FA_ERR_VALUE, "softcap");
  REFUSED(dense, r.dropout.p = 1, FA_ERR_VALUE, "dropout_p");
  REFUSED(dense, r.dropout.p = NAN, FA_ERR_VALUE, "dropout_p");
  REFUSED(dense, r.out.read_only = 1, FA_ERR_VALUE, "out");
  REFUSED(dense, r.out.stride[0] = 0, FA_ERR_VALUE, "out");
  REFUSED(dense, r.lse.dtype = FA_F64, FA_ERR_TYPE, "lse");
  REFUSED(dense, r.visibility.block_size = 64, FA_ERR_VALUE, "block_size");
  REFUSED(dense, r.visibility.mask = strided(FA_F32, memory, 2, 5, 7, 1, 1), FA_ERR_TYPE, "mask");
  REFUSED(dense, r.score.bias = strided(FA_F32, memory, 2, 5, 6, 1, 1), FA_ERR_VALUE, "bias");
  REFUSED(packed, r.lengths.cu_seqlens_k.dtype = FA_NONE, FA_ERR_VALUE, "cu_seqlens_k");
  REFUSED(packed, r.lengths.cu_seqlens_q.dtype = FA_I64, FA_ERR_TYPE, "cu_seqlens_q");
  REFUSED(packed, (r.lengths.has_max_q = 1, r.lengths.max_seqlen_q = 2), FA_ERR_VALUE, "max_seqlen_q");
  REFUSED(packed, r.lengths.cu_seqlens_q.data = lengths + 1, FA_ERR_VALUE, "cu_seqlens_q");
}

static void test_accepted(void) {
  fa_problem p;
  fa_error error = {FA_OK, ""};
  fa_request r = dense();
  CHECK(fa_problem_init(&p, &r, FA_FORWARD, 1, &error) == FA_OK, "%s", error.message);
  CHECK(p.batch == 2 && p.group == 2 && p.seqlen_q == 5 && p.seqlen_k == 7 && p.dim_qk == 8 && p.dim_v == 3, "dense sizes");
  CHECK(fabs(p.score.scale - 1 / sqrt(8.0)) < 1e-15, "default scale %g", p.score.scale);
  CHECK(p.visibility.rule.causal == 0 && p.visibility.rule.window_left == -1 && p.visibility.rule.window_right == -1, "no rule by default");

  r.out.dtype = r.lse.dtype = FA_NONE;
  CHECK(fa_problem_init(&p, &r, FA_FORWARD, 0, &error) == FA_OK, "outputs may be absent for explain: %s", error.message);
  CHECK(fa_problem_init(&p, &r, FA_FORWARD, 1, &error) == FA_ERR_TYPE, "but not to run");

  r = packed();
  CHECK(fa_problem_init(&p, &r, FA_FORWARD, 1, &error) == FA_OK, "%s", error.message);
  CHECK(p.batch == 3 && p.lengths.packed && p.seqlen_q == 3 && p.total_k == 6, "packed sizes");
  fa_sequence s = fa_sequence_of(&p, 1);
  CHECK(s.q_start == 3 && s.len_q == 2 && fa_sequence_of(&p, 2).len_k == 0, "sequence 1 starts at %lld", (long long)s.q_start);
}

static void test_messages(void) {
  fa_error error = {FA_OK, ""};
  char long_text[2 * FA_MESSAGE_BYTES];
  memset(long_text, 'x', sizeof long_text - 1);
  long_text[sizeof long_text - 1] = '\0';
  CHECK(fa_fail(&error, FA_ERR_RUNTIME, "%s", long_text) == FA_ERR_RUNTIME, "code");
  CHECK(strlen(error.message) == FA_MESSAGE_BYTES - 1, "a long message is cut, not overrun: %zu", strlen(error.message));
  CHECK(fa_fail(NULL, FA_ERR_VALUE, "nobody listens") == FA_ERR_VALUE, "no fa_error");
}

void test_problem(void) {
  test_accepted();
  test_refusals();
  test_messages();
}
