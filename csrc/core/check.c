/* check.c: checks of one tensor, shared by all of problem.c. */
#include "check.h"

#include <stdio.h>

const char *fa_dtype_name(fa_dtype dtype) {
  static const char *const names[] = {"none", "float32", "float64", "float16", "bfloat16", "int32", "int64", "bool", "float8_e4m3fn"};
  return dtype < FA_OTHER ? names[dtype] : "unsupported";
}

static const char *device_name(fa_device device) {
  static const char *const names[] = {"cpu", "cuda", "another device"};
  return names[device];
}

fa_shape_text fa_shape_of(int ndim, const int64_t *shape) {
  fa_shape_text out;
  size_t used = 0;
  out.text[0] = '\0';
  for (int i = 0; i < ndim && used < sizeof out.text; i++)
    used += (size_t)snprintf(out.text + used, sizeof out.text - used, "%s%lld", i ? ", " : "(", (long long)shape[i]);
  if (used < sizeof out.text) snprintf(out.text + used, sizeof out.text - used, "%s", ndim == 0 ? "()" : ndim == 1 ? ",)" : ")");
  return out;
}

fa_code fa_check_device(const char *name, const fa_tensor *t, const fa_tensor *q, fa_error *error) {
  if (t->device == q->device && t->device_index == q->device_index) return FA_OK;
  return fa_fail(error, FA_ERR_VALUE, "%s: is on %s:%d, but q is on %s:%d; all tensors of a call must be on one device", name,
                 device_name(t->device), t->device_index, device_name(q->device), q->device_index);
}

fa_code fa_check_dtype(const char *name, const fa_tensor *t, fa_dtype first, fa_dtype second, fa_error *error) {
  if (t->dtype == first || t->dtype == second) return FA_OK;
  const char *joint = first == second ? "" : " or ", *other = first == second ? "" : fa_dtype_name(second);
  if (t->dtype == FA_OTHER)
    return fa_fail(error, FA_ERR_TYPE, "%s: has an unsupported dtype, must be %s%s%s", name, fa_dtype_name(first), joint, other);
  return fa_fail(error, FA_ERR_TYPE, "%s: dtype %s must be %s%s%s", name, fa_dtype_name(t->dtype), fa_dtype_name(first), joint, other);
}

fa_code fa_check_rank(const char *name, const fa_tensor *t, int rank, const char *meaning, fa_error *error) {
  if (t->ndim == rank) return FA_OK;
  return fa_fail(error, FA_ERR_VALUE, "%s: has %d dimensions, must have %d: %s", name, t->ndim, rank, meaning);
}

fa_code fa_check_shape(const char *name, const fa_tensor *t, int ndim, const int64_t *shape, fa_error *error) {
  int same = t->ndim == ndim;
  for (int i = 0; same && i < ndim; i++) same = t->shape[i] == shape[i];
  if (same) return FA_OK;
  return fa_fail(error, FA_ERR_VALUE, "%s: shape %s must be %s", name, fa_shape_of(t->ndim, t->shape).text, fa_shape_of(ndim, shape).text);
}

fa_code fa_check_writable(const char *name, const fa_tensor *t, fa_error *error) {
  if (t->read_only) return fa_fail(error, FA_ERR_VALUE, "%s: is read-only, but this call writes it", name);
  for (int i = 0; i < t->ndim; i++)
    if (t->shape[i] == 0) return FA_OK;
  for (int i = 0; i < t->ndim; i++)
    if (t->stride[i] == 0 && t->shape[i] > 1)
      return fa_fail(error, FA_ERR_VALUE, "%s: dimension %d of size %lld has stride 0; a written tensor must not overlap itself", name, i,
                     (long long)t->shape[i]);
  return FA_OK;
}

fa_code fa_broadcast(const char *name, const fa_tensor *t, const int64_t full[4], fa_grid *grid, fa_error *error) {
  int64_t stride[4] = {0, 0, 0, 0};
  int size[4] = {1, 1, 1, 1};
  int fits = t->ndim <= 4;
  for (int i = 0; fits && i < t->ndim; i++) {
    int axis = 4 - t->ndim + i;
    if (t->shape[i] != 1 && t->shape[i] != full[axis]) fits = 0;
    if (t->shape[i] == 1) continue;
    stride[axis] = t->stride[i];
    size[axis] = (int)t->shape[i];
  }
  if (!fits)
    return fa_fail(error, FA_ERR_VALUE, "%s: shape %s does not broadcast to (batch, heads, seqlen_q, seqlen_k) = %s", name,
                   fa_shape_of(t->ndim, t->shape).text, fa_shape_of(4, full).text);
  *grid = (fa_grid){t->data, t->dtype, stride[0], stride[1], stride[2], stride[3], size[0], size[1], size[2], size[3]};
  return FA_OK;
}

fa_code fa_check_at_most(const char *name, const char *what, int64_t value, int64_t limit, fa_error *error) {
  if (value <= limit) return FA_OK;
  return fa_fail(error, FA_ERR_VALUE, "%s: %s %lld is over the limit of %lld", name, what, (long long)value, (long long)limit);
}
