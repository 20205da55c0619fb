/* arguments.h: the positional arguments of the module's functions -> fa_request. Errors name the argument and what it may be. */
#ifndef FA_ARGUMENTS_H
#define FA_ARGUMENTS_H

#include "tensor_intake.h"

/* Positions, as in flash_attn_c/_C.pyi. */
enum {
  FA_ARG_Q = 0,
  FA_ARG_OUT = 3,
  FA_ARG_BIAS = 5,
  FA_ARG_RNG_STATE = 14,
  FA_ARG_CAUSAL = 16,
  FA_ARG_WINDOW,
  FA_ARG_SCALE,
  FA_ARG_SOFTCAP,
  FA_ARG_DROPOUT_P,
  FA_ARG_BLOCK_SIZE,
  FA_ARG_MAX_SEQLEN_Q,
  FA_ARG_MAX_SEQLEN_K,
  FA_ARG_LAYOUT,
  FA_ARG_DETERMINISTIC,
  FA_ARG_COMMON,               /* how many forward, backward and explain share */
  FA_ARG_DOUT = FA_ARG_COMMON, /* backward: dout .. dsinks */
  FA_ARG_GRADIENTS_END = FA_ARG_DOUT + 8
};

/* The same positions from the tuples of api.py: tensors (bias .. probs, or None for none of them) and options (causal .. deterministic).
 * out and lse are None. Borrows all. 0, or -1 with a Python error set. */
int fa_spread_tuples(PyObject *const qkv[3], PyObject *tensors, PyObject *options, PyObject *args[FA_ARG_COMMON]);

/* Fills *request from the common arguments. 0, or -1 with a Python error set. */
int fa_parse_common(fa_intake *intake, PyObject *const *args, fa_request *request);

/* Fills request->grad from the arguments from FA_ARG_DOUT on. */
int fa_parse_gradients(fa_intake *intake, PyObject *const *args, fa_request *request);

/* True or False, nothing else. */
int fa_parse_bool(const char *name, PyObject *object, int32_t *out);

#endif
